"""An SVG file as a part of a page that allows neither scripts nor styles but its own."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from moeprune.errors import InputError

# All that plots are made of. Anything else, such as a script, has no place in the page.
ELEMENTS = {
    "svg", "g", "defs", "use", "clipPath", "path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "image",
    "text", "tspan", "pattern", "mask", "linearGradient", "radialGradient", "stop",
}  # fmt: skip
REFERENCE = re.compile(r"url\(#([^)]+)\)")
IMAGE = "data:image/png;base64,"
LONG_NUMBER = re.compile(r"(\d\.\d{3})\d+")


def drawing(path: Path, prefix: str, title: str) -> str:
    """The markup of the file's ``svg`` element, with every id begun by ``prefix`` and its title for those who listen.

    Styles become attributes, coordinates keep three decimals, references out of the file are dropped. Raises InputError
    where the file is no SVG.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path} is not an SVG file: {error}.", change="Draw the figures again.") from error
    if _local(root.tag) != "svg":
        raise InputError(f"{path} is not an SVG file: its first element is {_local(root.tag)}.")
    wanted = {name for element in root.iter() for name in _references(element)}
    cleaned = _cleaned(root, prefix, wanted)
    cleaned.attrib |= {"role": "img", "aria-label": title}
    return ElementTree.tostring(cleaned, encoding="unicode")


def _cleaned(element: Element, prefix: str, wanted: set[str]) -> Element:
    kept = Element(_local(element.tag), dict(_attributes(element, prefix, wanted)))
    kept.text = element.text if kept.tag in ("text", "tspan") else None
    kept.extend(
        _cleaned(child, prefix, wanted)
        for child in element
        if isinstance(child.tag, str) and _local(child.tag) in ELEMENTS  # a comment has no name
    )
    return kept


def _attributes(element: Element, prefix: str, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """An element's own attributes, then those that its style sets, for a style counts more."""
    for name, value in element.attrib.items():
        local = _local(name)
        if local == "id":
            if value in wanted:
                yield "id", prefix + value
        elif local == "href":
            if value.startswith("#"):
                yield "href", f"#{prefix}{value[1:]}"
            elif value.startswith(IMAGE):
                yield "href", value
        elif local == "d":
            yield "d", LONG_NUMBER.sub(r"\1", value)
        elif local != "style" and not local.startswith("on"):
            yield local, _prefixed(value, prefix)
    for name, value in _style(element):
        yield name, _prefixed(value, prefix)


def _style(element: Element) -> Iterator[tuple[str, str]]:
    for setting in element.get("style", "").split(";"):
        name, colon, value = setting.partition(":")
        if colon:
            yield name.strip(), value.strip()


def _prefixed(value: str, prefix: str) -> str:
    return REFERENCE.sub(rf"url(#{prefix}\1)", value)


def _references(element: Element) -> Iterator[str]:
    for name, value in element.attrib.items():
        yield from REFERENCE.findall(value)
        if _local(name) == "href" and value.startswith("#"):
            yield value[1:]


def _local(name: str) -> str:
    return name.rpartition("}")[2]
