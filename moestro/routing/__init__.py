"""What routers decide, and the record of what a layer did."""

from moestro.routing.decisions import Routing, SlotRouting, SoftRouting, SparseRouting, present
from moestro.routing.trace import Origin, Overheard, StepTraffic, Trace, TracedLayer

__all__ = [
    "Origin",
    "Overheard",
    "Routing",
    "SlotRouting",
    "SoftRouting",
    "SparseRouting",
    "StepTraffic",
    "Trace",
    "TracedLayer",
    "present",
]
