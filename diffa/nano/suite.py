"""nano-suite: a small real benchmark of spoken digits in MMSU's shape."""

from __future__ import annotations

from diffa.evaluation import prompts
from diffa.evaluation.items import Fields, Question
from diffa.evaluation.suites.mmsu import MMSU


class Nano(MMSU):
    """Digits of the Free Spoken Digit Dataset, asked in nano's own words, scored as MMSU is."""

    name = "nano-suite"
    prompts = ("nano@1", "mmsu@2026-02")

    def ask(self, fields: Fields, prompt: str) -> Question:
        """The question as nano was trained to read it: eight tokens hold a letter and a word."""
        if prompt != "nano@1":
            return super().ask(fields, prompt)
        options = self.options(fields)
        text = prompts.nano(str(fields["question"]), list(options.values()))
        return Question(text, tuple(options), 8, None)
