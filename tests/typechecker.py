"""The checker behind jaxtyping's annotations in tests: a whole number is also a number, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
