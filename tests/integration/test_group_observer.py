"""The observer of Ray's controller, with a real Ray session that lacks what it would like."""

from __future__ import annotations

import pytest

from pipeline.workers.group_observer import GroupObserver
from pipeline.workers.session import ray_session


@pytest.mark.slow
def test_a_restart_goes_on_where_ray_cannot_be_made_to_count_its_machines():
    with ray_session() as ray:
        with pytest.raises(ValueError, match="AutoscalingCoordinator"):
            ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        GroupObserver(board=None)._count_machines()
