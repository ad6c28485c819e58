"""Parts that error messages share: quoted errors, counts and lists of names."""

from collections.abc import Sequence

__all__ = ["counted", "listed", "one_line", "ranges"]

LONGEST_QUOTE = 200


def one_line(error: BaseException) -> str:
    """Write an error's message as one sentence on one line, cut if it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST_QUOTE:
        text = text[:LONGEST_QUOTE].rsplit(" ", 1)[0] + " ..."
    return text if text.endswith((".", "!", "?")) else text + "."


def counted(number: int, noun: str) -> str:
    """Write a count with its noun: 1 block, 2,000 blocks."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: list[str]) -> str:
    """List the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers with runs shortened, as in `3, 5-8, 12`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
