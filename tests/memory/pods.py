"""Several devices that are described, not there."""

import pytest

from jaxpeft import sharding
from jaxpeft.errors import InputError
from jaxpeft.memory import targets


def described(name):
    target = targets.target(name)
    try:
        targets.devices(target)
    except InputError as error:
        pytest.skip(str(error))
    return target


def mesh_of(target, text):
    return sharding.make_mesh(text, targets.devices(target))
