"""Escaping foreign texts for Markdown: each appears literally, on one line, whatever it contains.

In CommonMark a backslash before ASCII punctuation escapes it, also in the cells of tables. In a code span it does not:
there only the backticks around the text matter, and a table holds no code span.
"""

import re

__all__ = ["Markdown", "code", "inline"]

MOST_SHOWN = 500  # characters of one text
# Emphasis, code, links and images, HTML, entities, tables, formulas, mentions, and addresses that become links.
SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|&~$@!^]")
# What begins a list, a rule or a heading's underline at the start of a line, and what begins an address.
FIRST = re.compile(r"^(?:(\d+)([.)])(?=\s|$)|([-+=])(?![\d.]))")
ADDRESS = re.compile(r"(?i)(www(?=\.)|(?:https?|ftp|mailto|xmpp)(?=:))(.)")


class Markdown(str):
    """A text that is already Markdown and must not be escaped again."""

    __slots__ = ()


def inline(text: str, most: int = MOST_SHOWN) -> Markdown:
    """Escape a text for a paragraph, a heading, a list or a table cell; a long text is cut after `most` characters."""
    escaped = SPECIAL.sub(r"\\\g<0>", _one_line(text, most))
    first = FIRST.sub(lambda match: f"{match[1] or ''}\\{match[2] or match[3]}", escaped)
    return Markdown(ADDRESS.sub(r"\1\\\2", first))


def code(text: str) -> Markdown:
    """Write a text as a code span for a paragraph or a list; not for a table, where a pipe would end it."""
    content = _one_line(text)
    if not content:
        return Markdown("")
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest or content.startswith(" ") else ""
    return Markdown(f"{fence}{space}{content}{space}{fence}")


def _one_line(text: str, most: int = MOST_SHOWN) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
