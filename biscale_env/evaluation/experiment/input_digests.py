"""Digests of what a comparison is made from, so that a resumed one cannot mix two of a name."""

from collections.abc import Iterable

from biscale_env.evaluation.experiment.compare import ComparisonJob
from biscale_env.evaluation.rollouts.scenarios import Case, resolve
from biscale_env.evaluation.runs.provenance import file_hash, text_hash
from biscale_env.models.coefficient_files import stem
from biscale_env.models.iteration_model import IterationModel
from biscale_env.policies import find_policy
from biscale_env.policies.checkpoint_source import CheckpointSource
from biscale_env.policies.class_source import ClassSource
from biscale_env.policies.onnx_source import OnnxSource
from biscale_env.policies.policy_source import is_planned


def inputs_of(jobs: Iterable[ComparisonJob]) -> dict[str, str]:
    """SHA-256 of every input of some jobs, by its name in a sentence.

    GPU, LLM and SLO are hashed as they were read, so that a comment in a file changes nothing;
    fitted models by all their files, the GPU's layer among them; checkpoints by file; traces
    by the parts that tuning and tables take. Generated workloads by the first one, since it also
    tells a changed generator.
    """
    found: dict[str, str] = {}
    done = set()
    for job in jobs:
        point = (job.scenario.model_dump_json(), job.phase)
        if point not in done:
            done.add(point)
            found |= case_inputs(resolve(job.scenario, job.phase))
        if not is_planned(job.build):
            found |= policy_inputs(job.build, job.phase)
    return found


def case_inputs(case: Case) -> dict[str, str]:
    """Inputs of one scenario and phase: instance and workload."""
    plant, scenario = case.plant, case.scenario
    found = {
        f"GPU {plant.gpu.name}": text_hash(plant.gpu.model_dump_json()),
        f"LLM {plant.llm.name}": text_hash(plant.llm.model_dump_json()),
        f"SLO {plant.slo.name}": text_hash(plant.slo.model_dump_json()),
    }
    found[f"model {_model_name(scenario.instance.family, plant.model)}"] = plant.model.digest
    if case.of_trace:
        parts = " ".join(t.sha256 for side in (case.tuning, case.judged) for t in side.traces)
        found[f"trace {scenario.trace} ({case.phase})"] = text_hash(parts)
    else:
        name = f"workload {scenario.profile} of {scenario.name} at load {scenario.load:g}"
        found[f"{name} ({case.phase})"] = case.workload(0).sha256
    return found


def _model_name(family: str, model: IterationModel) -> str:
    """Name that no other model of the same comparison has: a family has one per TP and format."""
    made = f"{family} ({stem(model.phase, model.dtype, model.tp, model.ep)})"
    return f"{made} on {model.gpu.name} with {model.llm.name}" if model.fitted_on else made


def policy_inputs(build: str, phase: str) -> dict[str, str]:
    """Files of a policy that is not part of this package.

    The checkpoint of a learned one, with the configuration beside a model of Stable-Baselines3, or
    the source file of a class from outside.
    """
    source = find_policy(build)
    if isinstance(source, CheckpointSource):
        path = source.path(phase)
        kind, name = "checkpoint", source.base
        files = [path, *([path.with_name("config.yaml")] if path.suffix == ".zip" else [])]
    elif isinstance(source, OnnxSource):
        kind, name, files = "policy", str(source.path), [source.path]
    elif isinstance(source, ClassSource):
        kind, name, files = "policy", build.partition(":")[0], source.files()
    else:
        return {}
    return {f"{kind} {name} ({file.name})": file_hash(file) for file in files if file.is_file()}
