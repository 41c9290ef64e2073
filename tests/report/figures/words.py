"""Whether all words of a figure can be read."""

from matplotlib.figure import Figure
from matplotlib.text import Text


def cut_off(figure: Figure) -> list[str]:
    """The texts that stand out over an edge of the figure."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    found = []
    for text in figure.findobj(Text):
        extent = text.get_window_extent()
        if text.get_text() and text.get_visible() and (min(extent.p0) < 0 or extent.x1 > width or extent.y1 > height):
            found.append(text.get_text())
    return found
