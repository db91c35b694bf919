"""What `rlkd distil` is given for a real model."""

import pytest

from rlkd.envs.real_config import RealConfig
from rlkd.errors import UserError


def test_a_profile_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"hardware: got 'gpuu'; allowed: .*did you mean gpu"):
        RealConfig("teacher", "data", hardware="gpuu").check()
