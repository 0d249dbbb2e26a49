"""The checker of signatures that conftest.py puts around every function of the package."""

from beartype import BeartypeConf, beartype

# As PEP 484 has it, an int may stand where a float is asked for: JSON writes whole seconds as ints. beartype looks at
# one item of a list, by chance; without this a list of both would fail now and then.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
