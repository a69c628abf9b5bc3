"""The first lines of a report, for a reader who wants to know whether to start, and no more."""

from collections.abc import Mapping, Sequence

__all__ = ["first_lines"]

# By the name of a fault, what is to be mended, without a word of the method.
_TO_MEND = {
    "data": "the data cannot be read as they are",
    "nan-in-data": "the data hold values that are no numbers",
    "integer-parameter": "a hyperparameter is an integer, which has no gradient",
    "not-a-loss": "a loss is not a tensor",
    "non-scalar": "a loss is not one number",
    "detached": "a loss is cut off from what is to be learned",
    "objective-raised": "a loss function raises an error",
    "torch-error": "a loss function raises an error",
    "in-place": "a loss function changes its input",
    "double-backward": "a part of the model cannot be differentiated twice",
    "non-finite": "a number that is computed is not finite",
    "unused-ul-value": "a hyperparameter is not used",
    "learning-rate": "a hyperparameter can be searched for, but not be learned by gradient",
    "objectives-swapped": "the two losses seem to be swapped",
    "no-implicit-term": "training does not depend on the hyperparameters",
    "derivative": "a derivative is wrong",
    "training-diverges": "training of the inner model diverges",
    "not-at-minimum": "training of the inner model does not get far enough",
    "not-smooth": "the loss of the inner model has kinks where training ends",
    "mode-leak": "a loss function leaves a model in another mode",
    "wrong-sign": "a loss seems to have the wrong sign",
    "diverging-step": "the gradient of the hyperparameters cannot be computed with these settings",
    "negative-curvature": "the gradient of the hyperparameters cannot be computed with these settings",
    "solver": "the gradient of the hyperparameters cannot be computed with these settings",
    "residual-near-one": "the gradient of the hyperparameters is hardly computed with these settings",
    "skipped-steps": "steps of the hyperparameters are skipped",
    "ul-rate-too-small": "the hyperparameters would hardly move",
    "ul-values-run-away": "the hyperparameters run away",
    "trial-diverges": "training diverges once the hyperparameters move",
    "finite-differences": "the gradient of the hyperparameters is wrong",
}


def first_lines(faults: Sequence[str], warnings: int, figures: Mapping[str, float]) -> list[str]:
    """Return, line by line, whether a search can be started, how long a trial takes, and where to read on.

    Parameters
    ----------
    faults : sequence of str
        The names of the faults.
    warnings : int
        How many warnings there are.
    figures : mapping of str to float
        Those of the report.
    """
    return [
        _verdict(faults, warnings),
        _time(figures),
        "The rest is for who wants to know why; the last line holds the settings to take.",
    ]


def _verdict(faults: Sequence[str], warnings: int) -> str:
    if faults:
        told = dict.fromkeys(_TO_MEND.get(name, name.replace("-", " ")) for name in faults)
        count = f"{len(faults)} things" if len(faults) > 1 else "1 thing"
        return f"Not ready: {count} must be mended first ({'; '.join(told)}). See FAULT below."
    if warnings:
        return f"Ready to search. Read what is marked warning below first ({warnings})."
    return "Ready to search."


def _time(figures: Mapping[str, float]) -> str:
    if not {"trial_s", "ul_values", "ll_parameters"} <= figures.keys():
        return "How long a trial takes was not measured."
    learned, weights = int(figures["ul_values"]), int(figures["ll_parameters"])
    return (
        f"A trial with these settings takes about {_duration(figures['trial_s'])}: it trains the inner model "
        f"({weights:,} weight{'s' * (weights != 1)}) and learns {learned:,} hyperparameter{'s' * (learned != 1)} by "
        "gradient."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
