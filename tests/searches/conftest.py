from collections.abc import Iterator

import pytest
import ray

from tests.support import problems, toy


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, started once for all tests; its workers get the toy by value, wherever pytest was started."""
    for module in (problems, toy):
        ray.cloudpickle.register_pickle_by_value(module)
    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
    for module in (problems, toy):
        ray.cloudpickle.unregister_pickle_by_value(module)
