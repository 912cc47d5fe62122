"""Cells as a table of a page, in markdown."""


def lined(header, *lines, words):
    """A table of text cells; the first `words` columns hold words, the others numbers, to the right."""
    lines = [header, ["---" if k < words else "---:" for k in range(len(header))], *lines]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(cell):
    return cell.replace("|", "\\|")  # in the reason of a failure, say
