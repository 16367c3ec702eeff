"""Every kernel beside its reference, and what launches must not do."""

from collections.abc import Iterator
from itertools import chain

from gpu_check.loading import has_gpu, is_interpreted, load_kernels
from gpu_check.pieces import MEASURED, SKIPPED, Check, Options

#: Tokens of the requests of one launch.
_LENGTHS = [0, 1, 2, 15, 16, 17, 31, 33, 100, 1000, 4097, 8192]
_SHORT = [0, 1, 33]


def run(options: Options) -> Iterator[Check]:
    """Natively where there is a GPU, else interpreted and small."""
    load_kernels()
    import torch

    from gpu_check import parity_moves, parity_rows, parity_scores
    from gpu_check.compared import check_all

    native = has_gpu() and not is_interpreted()
    if not native and not is_interpreted():
        raise RuntimeError("without a GPU, kernels need TRITON_INTERPRET=1")
    device, lengths = ("cuda", _LENGTHS) if native else ("cpu", _SHORT)
    # References multiply in float32, not in TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    small = options.quick or not native
    how = "on the GPU" if native else "interpreted on the CPU: small shapes only"
    yield Check("kernels run", MEASURED, how, {"native": native, "lengths": lengths})
    cases = list(
        chain(
            parity_scores.cases(lengths, small, device, options.seed),
            parity_moves.cases(lengths, small, device, options.seed),
            parity_rows.cases(device, options.seed),
        )
    )
    chosen = options.kernels or [case.kernel for case in cases]
    if unknown := set(chosen) - {case.kernel for case in cases}:
        valid = ", ".join(dict.fromkeys(case.kernel for case in cases))
        raise ValueError(f"--kernels has {', '.join(sorted(unknown))}: valid: {valid}")
    yield from check_all(case for case in cases if case.kernel in chosen)
    if not native:
        why = "no NVIDIA GPU: nothing to synchronize with"
        yield Check("steady state", SKIPPED, why)
        return
    from gpu_check.steady import steady_checks

    yield from steady_checks(options)
