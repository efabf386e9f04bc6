"""One function call elsewhere in the connected Ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from infra.errors import UserError
from infra.same_code import check_same_code

Result = TypeVar("Result")
MAX_RETRIES = 3  # of a task whose machine was lost


def call_in_ray(
    function: Callable[..., Result],
    *arguments: Any,
    environment: Mapping[str, str],
    num_gpus: int,
) -> Result:
    """``function(*arguments)`` on a machine with so many free GPUs, ``environment`` set there.

    Raises what the function raises, of its errors for users the one line; ``UserError`` where the
    connected Ray has no such machine.
    """
    import ray

    resources: Callable[[], dict[str, float]] = ray.cluster_resources
    there = resources().get("GPU", 0.0)
    if there < num_gpus:
        raise UserError(
            expected=f"a Ray with {num_gpus} GPU",
            got=f"{there:g}",
            remedy="set cluster.use_gpu to false, or name a ray_address that has one",
        )
    task: Any = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=MAX_RETRIES)(_call)
    reference = task.remote(function, arguments, dict(environment))
    try:
        result: Result = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, Exception) else error) from None
    except BaseException:
        ray.cancel(reference, force=True)
        raise
    return result


def _call(
    function: Callable[..., Result], arguments: tuple[Any, ...], environment: Mapping[str, str]
) -> Result:
    os.environ.update(environment)
    check_same_code()
    return function(*arguments)
