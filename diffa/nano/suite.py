"""The benchmark nano-suite: a small real benchmark of spoken digits in MMSU's shape."""

from __future__ import annotations

from diffa.evaluation.items import Fields, Question
from diffa.evaluation.prompts import list_choices
from diffa.evaluation.suites.mmsu import MMSU


class NanoSuite(MMSU):
    """Digits of the Free Spoken Digit Dataset with nano's own prompt, scored as MMSU is."""

    name = "nano-suite"
    prompts = ("nano@1", "mmsu@2026-02")

    def question(self, fields: Fields, prompt: str) -> Question:
        """Return nano's training prompt; eight tokens hold a letter and a word."""
        if prompt != "nano@1":
            return super().question(fields, prompt)
        options = self.options(fields)
        listed = list_choices(list(options.values()), " ")
        text = f"{fields['question']} Choose the right letter. {listed}"
        return Question(text, tuple(options), 8, None)
