"""Conformance suites: subclass one per part in a plugin's own tests and let pytest run it.

    from diffa.testing import AdapterSuite

    class TestPool(AdapterSuite):
        name = "pool"
        options = {"stride": 4}

``name`` is the part's entry point, or ``part`` its class; ``options`` are what a spec would set.
A flag declares where a part differs on purpose. It inverts the check and never skips it.
"""

from diffa.testing.adapters import AdapterSuite
from diffa.testing.backbones import BackboneSuite
from diffa.testing.encoders import EncoderSuite
from diffa.testing.objectives import ObjectiveSuite
from diffa.testing.parts import failures
from diffa.testing.samplers import SamplerSuite
from diffa.testing.toy import Chaos, Joint, Sure, ToyDenoise, toy_canvas

__all__ = [
    "AdapterSuite",
    "BackboneSuite",
    "Chaos",
    "EncoderSuite",
    "Joint",
    "ObjectiveSuite",
    "SamplerSuite",
    "Sure",
    "ToyDenoise",
    "failures",
    "toy_canvas",
]
