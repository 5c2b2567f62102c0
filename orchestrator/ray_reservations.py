"""Reservations that nobody will use any more: made by a process that died before it could hand them to anybody.

Ray gives up a placement group of an actor only when the actor *and* its job have ended. Ray Train sees to its own
groups, but knows of one only once its workers have started: if a stage's controller dies before, with its trial or its
node, then CPUs and GPUs would stay reserved for the rest of the sweep. So would those that a controller asks for when
it is dead already: on a node that was cut off it lives on, and its request is served once the node is heard again.
"""

from __future__ import annotations

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

__all__ = ["give_up_reservations_of_the_dead"]


def give_up_reservations_of_the_dead() -> int:
    """Remove the placement groups of this job that were made by an actor which is dead; gives how many."""
    job = ray.get_runtime_context().get_job_id()
    orphans = [group for group in _groups() if group.creator_job_id.hex() == job and _is_orphan(group)]
    for group in orphans:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return len(orphans)


def _is_orphan(group: PlacementGroupTableData) -> bool:
    made_by_actor = group.creator_actor_id.strip(b"\xff") != b""
    is_gone = group.state == PlacementGroupTableData.REMOVED
    return made_by_actor and not group.is_detached and not is_gone and _is_dead(group.creator_actor_id)


def _is_dead(actor: bytes) -> bool:
    # Not ``group.creator_actor_dead``: that is noted for the groups that are there when the actor dies.
    told = state._connect_and_get_accessor().get_actor_info(ray.ActorID(actor))
    return told is not None and ActorTableData.FromString(told).state == ActorTableData.DEAD


def _groups() -> list[PlacementGroupTableData]:
    table = state._connect_and_get_accessor().get_placement_group_table()
    return [PlacementGroupTableData.FromString(entry) for entry in table]
