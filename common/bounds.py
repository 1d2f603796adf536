"""What the numbers of a configuration may be, checked as it is made."""

from common.errors import ConfigError


def check_bounds(config: object, group: str, **intervals: str) -> None:
    """Refuse a configuration with a number outside its interval, or with one that is none (nan).

    Args:
        config: has them as attributes: a number, a tuple of numbers, or None where it is left out.
        group: of its options on the command line: ``--optim.``, or ``--``.
        intervals: by attribute, as mathematics writes them: ``"[0, 1)"``, ``"(0, inf)"``.

    Raises:
        ConfigError: names the option, its value and what it must be.
    """
    for name, interval in intervals.items():
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(_lies_in(interval, number) for number in numbers):
            words = " ".join(map(str, (group + name.replace("_", "-"), *numbers)))
            raise ConfigError(f"{words}: must {_wanted(interval)}")


def _lies_in(interval: str, number: float) -> bool:
    least, greatest = map(float, interval[1:-1].split(", "))
    above = number >= least if interval.startswith("[") else number > least
    return above and (number <= greatest if interval.endswith("]") else number < greatest)


def _wanted(interval: str) -> str:
    least, greatest = interval[1:-1].split(", ")
    most = f" to {greatest}" if interval.endswith("]") else f", below {greatest}"
    most = "" if greatest == "inf" else most
    return f"be a number {'from' if interval.startswith('[') else 'above'} {least}{most}"
