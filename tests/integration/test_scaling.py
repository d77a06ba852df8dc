"""What runs ask of a cluster, on real Ray nodes of this machine, some with GPUs that are not there.

Ray counts the GPUs that it is told of; only a training would notice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

#: What a run would get, or why not, for each setting; then the same where machines can be added.
PLANS = """
import json, os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=32, num_gpus=4, resources={"accelerator_type:H100": 1})
cluster.add_node(num_cpus=16, num_gpus=2, resources={"accelerator_type:H100": 1})
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
from pipeline import launch
from pipeline.config import PipelineError
from pipeline.experiments import load_experiment

def answer(*words):
    try:
        group = launch.planned_workers(load_experiment("digits_lenet5", words))
        return [group.description, group.threads, group.strategy, group.room]
    except PipelineError as error:
        return str(error)

def report_autoscaler():
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import ClusterConfig
    config = ClusterConfig()
    config.node_group_configs.add(name="gpu", max_count=8, resources={"GPU": 8})
    GcsClient(cluster.address).report_cluster_config(config.SerializeToString())

settings = json.loads(sys.argv[1])
before = [answer(*words) for words in settings]
report_autoscaler()
print(json.dumps([before, [answer(*words) for words in settings]]))
cluster.shutdown()
"""

#: Workers on two machines that say what surrounds their training, and do not train.
WORKERS = """
import json, os, sys
from pathlib import Path
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
from pipeline import inputs, launch
from pipeline.experiments import load_experiment
experiment = load_experiment("digits_lenet5", sys.argv[2:])
manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *words: None)
events = []

def only_tell_threads(config):
    import torch
    from pipeline import launch
    def train(experiment, manifest, store, context, sources):
        context.event("threads", number=torch.get_num_threads())
    launch.train = train
    launch._train_worker(config)

launch._train_worker = only_tell_threads  # which Ray ships, as what it is to run
launch.train_on_ray(experiment, manifest, Path(sys.argv[1]), events.append)
print(json.dumps(events))
cluster.shutdown()
"""

#: A training that is given a second machine, which is then announced to be taken away.
GUEST = """
import json, os, subprocess, sys
from pathlib import Path
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
from pipeline import inputs, launch
from pipeline.experiments import load_experiment
launch._RESIZE_INTERVAL = 4.0  # a minute, otherwise
experiment = load_experiment("digits_lenet5", sys.argv[2:])
manifest = inputs.prepare(experiment, inputs.dataset_of(experiment), lambda *words: None)
guests, events = [], []

def tell(event):
    if event["kind"] != "step":
        events.append(event)
    elif not guests:
        guests.append(cluster.add_node(num_cpus=1))
    elif len(guests) == 1 and events[-1]["kind"] == "resumed":
        guests.append(None)
        drain = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address"]
        drain += [cluster.address, "--node-id", guests[0].node_id, "--reason"]
        drain += ["DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*drain, "--deadline-remaining-seconds", "8"], check=True, stdout=sys.stderr)

launch.train_on_ray(experiment, manifest, Path(sys.argv[1]), tell)
print(json.dumps(events, default=str))
cluster.shutdown()
"""


def output_of(program: str, *arguments: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_driver_without_gpus_sees_those_of_its_cluster_and_a_cluster_that_grows():
    settings = [
        [],
        ["scaling.gpu=H100", "scaling.nodes=2", "scaling.workers=2", "scaling.cores=16"],
        ["scaling.nodes=1"],
        ["scaling.workers=2..16"],
        ["scaling.gpu=A100", "scaling.workers=8"],
        ["scaling.nodes=3", "scaling.workers=8"],
    ]
    now, growing = output_of(PLANS, json.dumps(settings))
    assert now[:4] == [
        ["6 x H100, nccl", 8, "PACK", 6],
        ["2 x H100, nccl", 16, "STRICT_SPREAD", 3],
        ["4 x H100, nccl", 8, "STRICT_PACK", 6],
        ["2 to 16 x H100, nccl", 8, "PACK", 6],
    ]
    assert now[4].startswith("scaling.gpu=A100: the Ray cluster at ") and now[4].endswith(
        "has H100"
    )
    assert now[5].startswith("scaling.nodes=3 machines are more than the 2 of the Ray cluster")
    assert growing[:4] == now[:4]
    assert growing[4] == ["8 x A100, nccl", 1, "PACK", 0]
    assert growing[5] == ["8 x H100, nccl", 8, "SPREAD", 6]


@pytest.mark.slow
def test_workers_are_on_as_many_machines_as_asked_with_their_threads(tmp_path):
    settings = [
        f"data.prepared={tmp_path / 'prepared'}",
        "data.synthetic=[64,64]",
        "scaling.nodes=2",
        "scaling.workers=2",
        "scaling.cores=2",
    ]
    events = output_of(WORKERS, str(tmp_path), *settings)
    workers, threads = (event for event in events if event["kind"] in ("workers", "threads"))
    assert workers["hardware"] == "2 CPU workers on 2 machines, gloo"
    assert (workers["workers"], workers["machines"]) == (2, 2)
    assert threads["number"] == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_machine_that_comes_costs_no_step_and_one_that_will_go_is_saved_from_before(tmp_path):
    settings = [
        f"data.prepared={tmp_path / 'prepared'}",
        "data.synthetic=[8192,64]",
        "train.epochs=3",
        "train.batch_size=32",
        "scaling.workers=1..2",
        "scaling.max_failures=0",
    ]
    events = output_of(GUEST, str(tmp_path), *settings)
    kinds = [event["kind"] for event in events]
    assert [event["workers"] for event in events if event["kind"] == "workers"] == [1, 2, 1]
    stopped, (grown, shrunk) = (
        events[kinds.index("stopped")],
        [event for event in events if event["kind"] == "resumed"],
    )
    assert (grown["epoch"], grown["done"]) == (stopped["epoch"], stopped["done"])
    texts = [event.get("text", "") for event in events]
    announced = next(i for i, text in enumerate(texts) if "will be taken away in" in text)
    gone = kinds.index("restart")
    saves = [e for e in events[announced:gone] if e["kind"] in ("checkpoint", "epoch")]
    assert saves, "it is asked for a checkpoint as long as the machine is there"
    assert "was taken away, and with it worker" in texts[gone]
    last = saves[-1]
    assert (shrunk["epoch"], shrunk["done"]) >= (last["epoch"], last.get("done", 0))
    assert kinds[-1] == "evaluation"
