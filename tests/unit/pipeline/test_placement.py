from __future__ import annotations

import pytest

from pipeline.config import PipelineError, Recipe, Scaling
from pipeline.context import hardware
from pipeline.workers.placement import Cluster, Machine, check_shares, plan


def cluster(*machines: Machine, grows: bool = False) -> Cluster:
    return Cluster(machines, "the Ray cluster at head:6379", is_local=False, grows=grows)


def gpu_machine(gpus: int, kind: str = "H100", cores: int = 64) -> Machine:
    return Machine(cores, gpus, frozenset({kind}), kind)


HEAD = Machine(cores=4)
HERE = Cluster((Machine(cores=2),))
HERE_WITH_GPUS = Cluster(
    (Machine(24, 2, frozenset({"NVIDIA", "A100", "NVIDIA-A100"}), "NVIDIA A100"),)
)
TWO_CPU = cluster(Machine(8), Machine(8))
THREE_KINDS = cluster(HEAD, gpu_machine(8), gpu_machine(4), gpu_machine(8, "A100"))


@pytest.mark.parametrize(
    ("settings", "where", "workers", "words"),
    [
        ({}, HERE, (2, 2), "2 CPU workers, gloo"),
        ({"workers": 1}, HERE, (1, 1), "1 CPU worker, gloo"),
        ({"workers": 3}, HERE, (3, 3), "3 CPU workers, gloo"),
        ({"workers": "1..2"}, HERE, (1, 2), "1 to 2 CPU workers, gloo"),
        ({}, HERE_WITH_GPUS, (2, 2), "2 x NVIDIA A100, nccl"),
        ({"gpu": "A100"}, HERE_WITH_GPUS, (2, 2), "2 x A100, nccl"),
        ({"nodes": 4}, cluster(*[Machine(8)] * 4), (4, 4), "4 CPU workers, gloo"),
        # The driver's machine has no GPU here, as the head of a cluster may not.
        ({}, cluster(HEAD, gpu_machine(8)), (8, 8), "8 x H100, nccl"),
        ({}, THREE_KINDS, (20, 20), "20 x H100/A100, nccl"),
        ({"gpu": "H100"}, THREE_KINDS, (12, 12), "12 x H100, nccl"),
        ({"gpu": "H100", "nodes": 2}, THREE_KINDS, (8, 8), "8 x H100, nccl"),
        ({"nodes": 1}, THREE_KINDS, (8, 8), "8 x H100/A100, nccl"),
        ({"workers": "4..16"}, THREE_KINDS, (4, 16), "4 to 16 x H100/A100, nccl"),
    ],
)
def test_settings_mean_workers(settings, where, workers, words):
    group = plan(Scaling(**settings), where)
    assert (group.least, group.most) == workers
    assert group.description == words


@pytest.mark.parametrize(
    ("settings", "where", "threads", "reserved"),
    [
        ({}, HERE, 1, 1),
        ({"cores": 2, "workers": 1}, HERE, 2, 2),
        ({"cores": 4}, TWO_CPU, 4, 4),
        ({}, HERE_WITH_GPUS, 12, 1),
        ({"cores": 6}, HERE_WITH_GPUS, 6, 6),
        ({}, cluster(HEAD, gpu_machine(8, cores=96), gpu_machine(8, cores=64)), 8, 1),
    ],
)
def test_cores_are_threads_and_only_those_that_were_asked_for_are_reserved(
    settings, where, threads, reserved
):
    group = plan(Scaling(**settings), where)
    assert (group.threads, group.reserved_cores) == (threads, reserved)


@pytest.mark.parametrize(
    ("nodes", "workers", "strategy"),
    [(None, 8, "PACK"), (1, 8, "STRICT_PACK"), (2, 8, "SPREAD"), (2, 2, "STRICT_SPREAD")],
)
def test_nodes_are_a_placement_strategy_of_ray(nodes, workers, strategy):
    scaling = Scaling(nodes=nodes, workers=workers)
    assert plan(scaling, cluster(gpu_machine(8), gpu_machine(8))).strategy == strategy


@pytest.mark.parametrize(
    ("settings", "where", "words"),
    [
        ({"workers": 3}, HERE_WITH_GPUS, "3 is more than the 2 GPUs of this machine; set RAY_ADD"),
        ({"workers": "3..4"}, HERE_WITH_GPUS, "more than the 2 GPUs of this machine"),
        ({"cores": 3}, HERE, "scaling.cores=3 is more than the 2 CPU cores of this machine"),
        ({"cores": 1, "workers": 3}, HERE, "scaling.workers=3 is more than the 2 that fit on this"),
        ({"nodes": 2}, HERE, "there is this machine alone; set RAY_ADDRESS"),
        ({"gpu": "H100"}, HERE, "scaling.gpu=H100: this machine has no GPUs"),
        ({"gpu": "H100"}, HERE_WITH_GPUS, "scaling.gpu=H100: this machine has NVIDIA A100"),
        ({"gpu": "V100"}, THREE_KINDS, "the Ray cluster at head:6379 has H100, A100"),
        ({"cores": 9}, TWO_CPU, "the 8 CPU cores of any machine of the Ray cluster at"),
        ({"nodes": 3}, TWO_CPU, "scaling.nodes=3 machines are more than the 2 of the Ray cluster"),
        ({"nodes": 2, "gpu": "A100"}, THREE_KINDS, "more than the 1 of the Ray cluster"),
        ({"nodes": 2, "workers": 1}, TWO_CPU, "take scaling.workers=2 or more"),
        ({"nodes": 2, "workers": "2..4"}, TWO_CPU, "scaling.workers=2..4 Ray chooses the machines"),
        ({"nodes": 1, "workers": 9}, TWO_CPU, "scaling.nodes=1 of the Ray .* which can hold 8"),
        (
            {"nodes": 2, "workers": 8, "cores": 4},
            TWO_CPU,
            "which can hold 4, with scaling.cores=4 each",
        ),
    ],
)
def test_what_the_machines_do_not_have_is_refused_in_a_line(settings, where, words):
    with pytest.raises(PipelineError, match=words) as caught:
        plan(Scaling(**settings), where)
    assert "\n" not in str(caught.value)


def test_a_cluster_that_grows_is_asked_for_what_it_does_not_have_yet():
    growing = cluster(HEAD, grows=True)
    group = plan(Scaling(workers=16, nodes=2, gpu="H100", cores=12), growing)
    assert (group.most, group.gpu_name, group.strategy) == (16, "H100", "SPREAD")
    assert group.room == 0
    with pytest.raises(PipelineError, match="has no H100 yet to count; set scaling"):
        plan(Scaling(gpu="H100"), growing)


def test_a_cluster_that_is_busy_growing_by_hand_is_waited_for():
    group = plan(Scaling(workers=32), THREE_KINDS)
    assert (group.least, group.room) == (32, 20)


@pytest.mark.parametrize(
    ("settings", "workers", "words"),
    [
        ({"batch_size": 8}, 5, "train.batch_size=8 for 5 workers leaves .* take at least 10$"),
        ({"batch_size": 64, "accumulation": 8}, 5, "in train.accumulation=8 parts .* least 80$"),
        ({"batch_size": 64}, "2..40", "for 40 workers .* take at least 80$"),
        ({"batch_size": 64, "sync_batchnorm": True}, 2, "train.sync_batchnorm=true needs GPUs"),
    ],
)
def test_a_batch_too_small_for_batch_norm_is_refused_in_a_line(settings, workers, words):
    with pytest.raises(PipelineError, match=words):
        check_shares(Recipe(**settings), plan(Scaling(workers=workers), HERE))


def test_workers_need_not_divide_the_batch():
    check_shares(Recipe(batch_size=64), plan(Scaling(workers=3), HERE))
    check_shares(Recipe(batch_size=60, accumulation=10), plan(Scaling(workers=3), HERE))
    on_gpus = plan(Scaling(), HERE_WITH_GPUS)
    check_shares(Recipe(batch_size=64, sync_batchnorm=True), on_gpus)


def test_hardware_in_words_counts_each_kind():
    assert (
        hardware(["H100", "A100", "H100"], machines=2) == "2 x H100 + 1 x A100 on 2 machines, nccl"
    )
    assert hardware([None]) == "1 CPU worker, gloo"
