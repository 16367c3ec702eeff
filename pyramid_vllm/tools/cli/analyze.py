"""``pyramid-vllm analyze``: how much of its context each layer of a model needs."""

from pyramid_vllm.tools.analysis.settings import AnalyzeSettings
from pyramid_vllm.tools.cli.from_settings import from_settings


@from_settings(AnalyzeSettings)
def analyze(settings: AnalyzeSettings) -> None:
    """Measure what each layer needs of its context, and suggest a policy file."""
    from pyramid_vllm.tools.analysis.run import run_analysis

    run_analysis(settings)
