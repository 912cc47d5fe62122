"""check(name, answer): whether an exercise of the course is solved, and what is wrong where it is not."""

import importlib
import pkgutil


def check(name: str, answer) -> bool:
    """Print what is wrong with `answer` to exercise `name` ("02.1": the first of notebook 02); returns True when right.

    Never raises for a wrong answer, not for one that is a function and raises, so an unanswered stub (`...`) does not
    stop a notebook. Introduced in notebooks/00_measure_first.
    """
    exercises = _all()
    if name not in exercises:
        print(f"there is no exercise {name}: there are {', '.join(sorted(exercises))}")
        return False
    if answer is ...:
        print(f"{name}: not answered yet: put your answer in place of the ...")
        return False
    try:
        wrong = exercises[name](answer)
    except Exception as error:
        wrong = " ".join(f"your answer raised {type(error).__name__}: {error}".split())[:300]
    print(f"{name}: {'right' if wrong is None else wrong}")
    return wrong is None


def number(answer, least, most, otherwise, unit=""):
    """What is wrong with a number that should lie from `least` to `most`, None when nothing is."""
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        given = repr(answer)
        given = given if len(given) < 60 and "\n" not in given else f"a {type(answer).__name__}"
        return f"give a number{f' of {unit}' if unit else ''}, not {given}"
    return None if least <= answer <= most else otherwise


def _all():
    """name: a function of the answer that returns what is wrong, or None; each notebook's are in a module of their own."""
    found = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        found |= importlib.import_module(f"{__name__}.{module}").EXERCISES
    return found
