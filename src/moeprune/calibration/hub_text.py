"""Text made of records: of a data set on the Hugging Face hub, or of a local file or folder of the same schema."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.calibration.fields import first_filled, require_text, template_fields
from moeprune.calibration.records import Record, RecordSource
from moeprune.errors import InputError

log = logging.getLogger(__name__)

BETWEEN_RECORDS = "\n\n"


@dataclass(frozen=True)
class HubText:
    """One text, under a ``name`` of the user's choice: the records of ``records`` in their order, an empty line apart.

    A record becomes text by the first of ``templates`` whose fields all have something in them, such as
    ``"{question}\\n{answer}"``. A record that fills none is left out, or with ``skip_empty=False`` an empty text, as
    WikiText's empty lines are where perplexity on it is measured.

        source:
          _target_: moeprune.calibration.hub_text.HubText
          name: wikitext2
          records:
            _target_: moeprune.calibration.records.RecordSource
            path: Salesforce/wikitext
            subset: wikitext-2-raw-v1
            split: test
          templates: ['{text}']

    Raises InputError for templates that are no list of format strings with a field.
    """

    name: str
    records: RecordSource
    templates: Sequence[str]
    skip_empty: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.templates, str) or not self.templates:
            raise InputError(f"templates={self.templates} is no list.", change="Give a list of one or more templates.")
        for template in self.templates:
            if not template_fields(template):
                raise InputError(f"The template {template!r} has no field.", change="Write one in braces: {text}.")

    def read(self) -> dict[str, str]:
        """{name: text}.

        Raises InputError for data that cannot be had, for records with other fields, and where no record is filled.
        """
        records = self.records.read()
        texts = [self._written(record) for record in records]
        filled = sum(map(bool, texts))
        if not filled:
            raise InputError(
                f"Text {self.name!r}: none of the {len(records)} records of {self.records.path} has text in it.",
                possible=records[0],
                change="Name fields that hold text in the templates.",
            )
        log.info("text %s: %d of %d records of %s", self.name, filled, len(records), self.records.path)
        return {self.name: BETWEEN_RECORDS.join(text for text in texts if text or not self.skip_empty)}

    def identity(self) -> dict[str, object]:
        """What the content depends on, for cache keys: which records of what, and how they are written."""
        written_as = {"templates": list(self.templates), "skip_empty": self.skip_empty}
        return {"name": self.name, "records": self.records.identity(), **written_as}

    def _written(self, record: Record) -> str:
        template = first_filled(self.templates, record)
        if template is None:
            return ""
        require_text(template_fields(template), record)
        return template.format_map(record)
