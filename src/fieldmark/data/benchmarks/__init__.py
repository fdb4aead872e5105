"""Public data sets as their authors unpack them: NAME:DIR, one file a data set.

Splits are those of the papers on zero-shot retrieval, counts are checked against the published ones, and what is
missing is named with the place to get it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fieldmark.data.benchmarks.abo import read_abo
from fieldmark.data.benchmarks.aircraft import read_aircraft
from fieldmark.data.benchmarks.cars import read_cars
from fieldmark.data.benchmarks.cub import read_cub
from fieldmark.data.benchmarks.fashion import read_fashion
from fieldmark.data.benchmarks.inat_aves import read_inat_aves
from fieldmark.data.benchmarks.inshop import read_inshop
from fieldmark.data.benchmarks.m5product import read_m5product
from fieldmark.data.benchmarks.sop import read_sop
from fieldmark.data.readers import Row

# prefix of a source -> its reader; train and test classes are disjoint in all of them but m5product
READERS: dict[str, Callable[[Path], list[Row]]] = {
    "cub": read_cub,
    "cars": read_cars,
    "aircraft": read_aircraft,
    "inat-aves": read_inat_aves,
    "sop": read_sop,
    "inshop": read_inshop,
    "abo": read_abo,
    "m5product": read_m5product,
}

__all__ = ["READERS", "read_fashion"]
