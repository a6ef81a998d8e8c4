"""A thousand calls leave nothing behind, and calls don't meet: in threads, in tasks of asyncio, in a forked process."""

import asyncio
import copy
import gc
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import tiny_vit

from libragrad_minimal import LIBRA, PLAIN, additive_constants, attribute, libra_grad, observed
from libragrad_minimal.engine import backward

PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_vit(img_size=16, embed_dim=16, depth=2)


def gradient(model, rules=LIBRA) -> torch.Tensor:
    pixels = PICTURES.clone().requires_grad_()
    with observed():
        logit = model(pixels)[:, 1].sum()
    return libra_grad(logit, (pixels, *additive_constants(logit, pixels)), rules)[0]


def scores(model, rules=LIBRA) -> torch.Tensor:
    return attribute(model, PICTURES, 1, "FullGrad+", rules).scores


def alive() -> dict[str, int]:
    """What is alive: tensors, nodes of graphs, our own objects."""
    gc.collect()
    kinds = {"tensors": 0, "ours": 0, "objects": 0}
    for thing in gc.get_objects():
        kinds["objects"] += 1
        kinds["tensors"] += issubclass(type(thing), torch.Tensor)
        kinds["ours"] += str(type(thing).__module__).startswith("libragrad_minimal")
    return kinds


def hooks_of(model) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource counts memory on Unix")
@pytest.mark.parametrize("call", [gradient, scores])
def test_a_thousand_calls_leave_nothing(model, call):
    import resource

    def highest() -> float:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size / (2**20 if sys.platform == "darwin" else 2**10)  # MiB

    for _ in range(100):
        call(model)
    before, memory = alive(), highest()
    for _ in range(1000):
        call(model)
    after = alive()
    assert {kind: after[kind] - before[kind] for kind in ("tensors", "ours")} == {"tensors": 0, "ours": 0}
    assert after["objects"] - before["objects"] < 200  # caches of the interpreter; a leak would be thousands
    assert highest() - memory < 20
    assert hooks_of(model) == 0 and not backward._owners
    assert all(parameter.grad is None for parameter in model.parameters())


def maps(model, rules=LIBRA) -> torch.Tensor:
    """Read off attention maps, which fused kernels don't leave behind."""
    return attribute(model, PICTURES, 1, "GenAtt", rules).scores


def output(model, rules=LIBRA) -> torch.Tensor:
    """Somebody else's run of the same model."""
    return model(PICTURES).detach()


@pytest.mark.parametrize("call", [gradient, scores])
def test_threads_don_t_meet(model, call):
    expected = {rules: call(model, rules) for rules in (LIBRA, PLAIN)}
    asked = [LIBRA, PLAIN] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda rules: call(model, rules), asked))
    for rules, result in zip(asked, found, strict=True):
        torch.testing.assert_close(result, expected[rules])


def test_threads_that_do_different_things_to_one_model_don_t_meet(model):
    calls = [scores, maps, output, gradient] * 10
    expected = {call: call(model) for call in set(calls)}
    fresh = copy.deepcopy(model)  # nothing is known of it
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda call: call(fresh), calls))
    for call, result in zip(calls, found, strict=True):
        torch.testing.assert_close(result, expected[call])


@pytest.mark.parametrize("call", [gradient, scores])
def test_tasks_of_asyncio_don_t_meet(model, call):
    expected = {rules: call(model, rules) for rules in (LIBRA, PLAIN)}

    async def ask(rules):
        await asyncio.sleep(0)
        here = call(model, rules)
        elsewhere = await asyncio.to_thread(call, model, rules)
        return rules, here, elsewhere

    async def everyone():
        return await asyncio.gather(*(ask(rules) for rules in [LIBRA, PLAIN] * 5))

    for rules, *results in asyncio.run(everyone()):
        for result in results:
            torch.testing.assert_close(result, expected[rules])


def in_child(model, queue):
    torch.set_num_threads(1)
    queue.put([gradient(model).numpy(), scores(model).numpy()])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system doesn't fork")
def test_a_forked_process_computes_the_same(model):
    """Forked before the parent runs backward passes on several threads, after which PyTorch itself can't fork."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(model, queue))
    child.start()
    try:
        found = queue.get(timeout=60)
    finally:
        child.kill()
        child.join()
    for result, expected in zip(found, (gradient(model), scores(model)), strict=True):
        torch.testing.assert_close(torch.from_numpy(result), expected)
