"""Tables as Markdown."""


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A table under its title."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([title, "", lines[0], "|---" * len(head) + "|", *lines[1:]])
