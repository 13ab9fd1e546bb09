"""The commands of `steering`, for `scripts/` and the console alike."""

from sae.command_line import run


def steer() -> None:
    from steering.steer import SteerConfig, steer

    run(steer, SteerConfig, "Print a model's continuation of a prompt without and with a feature added.")


def measure_steering() -> None:
    from steering.studies.strengths import StrengthsConfig, strengths

    run(strengths, StrengthsConfig, "Measure what adding a feature does at several strengths, against a random direction.")


def principal_directions() -> None:
    from steering.studies.principal import PrincipalConfig, principal_study

    run(principal_study, PrincipalConfig, "Whether principal directions mean anything: against random and learned ones at equal KL.")


def effect_map() -> None:
    from steering.studies.effect_map import EffectConfig, effect_map

    run(effect_map, EffectConfig, "What else steering with a feature moves, and a direction that moves it alone.")


def compare_directions() -> None:
    from steering.compare.command import CompareConfig, compare_directions

    run(compare_directions, CompareConfig, "Compare ways to steer towards a concept at equal KL, with controls and intervals.")


def browse_features() -> None:
    from sae.features.browser.serve import BrowseConfig
    from steering.panel import browse

    run(browse, BrowseConfig, "Look at features in the web browser: search, prompts, steering, labels; served on this machine alone.")
