"""Texts of strangers in Markdown: shown as they are, whatever they contain, on one line.

CommonMark takes a backslash before any ASCII punctuation as "this character itself", in the cells of tables too. In a
code span it does not, so that there only the backticks around it matter, and no code span stands in a table.
"""

import re

__all__ = ["Markdown", "code", "inline"]

MOST_SHOWN = 500  # characters of one text
# Emphasis, code, links and images, HTML, entities, tables, formulas, mentions, and addresses that become links.
SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|&~$@!^]")
# What begins a list, a rule or the line below a heading where it stands first, and what begins an address.
FIRST = re.compile(r"^(?:(\d+)([.)])(?=\s|$)|([-+=])(?![\d.]))")
ADDRESS = re.compile(r"(?i)(www(?=\.)|(?:https?|ftp|mailto|xmpp)(?=:))(.)")


class Markdown(str):
    """A text that is Markdown already, and is not escaped again."""

    __slots__ = ()


def inline(text: str, most: int = MOST_SHOWN) -> Markdown:
    """A text as words in a paragraph, a heading, a list or the cell of a table; of a long one, the beginning."""
    escaped = SPECIAL.sub(r"\\\g<0>", _one_line(text, most))
    first = FIRST.sub(lambda found: f"{found[1] or ''}\\{found[2] or found[3]}", escaped)
    return Markdown(ADDRESS.sub(r"\1\\\2", first))


def code(text: str) -> Markdown:
    """A text as a code span in a paragraph or a list; not in a table, where a pipe would end it."""
    content = _one_line(text)
    if not content:
        return Markdown("")
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest or content.startswith(" ") else ""
    return Markdown(f"{fence}{space}{content}{space}{fence}")


def _one_line(text: str, most: int = MOST_SHOWN) -> str:
    words = " ".join(text.split())
    return words if len(words) <= most else words[: most - 1] + "…"
