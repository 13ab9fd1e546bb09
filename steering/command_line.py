"""The commands of `steering`, for `scripts/` and the console alike."""

from sae.command_line import run


def steer() -> None:
    from steering.steer import SteerConfig, steer

    run(steer, SteerConfig, "Print a model's continuation of a prompt without and with a feature added.")


def measure_steering() -> None:
    from steering.strengths import StrengthsConfig, strengths

    run(strengths, StrengthsConfig, "Measure what adding a feature does at several strengths, against a random direction.")


def browse_features() -> None:
    from sae.features.browse import BrowseConfig
    from steering.panel import browse

    run(browse, BrowseConfig, "Look at features in the web browser: search, prompts, steering, labels; served on this machine alone.")
