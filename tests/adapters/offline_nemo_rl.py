"""A pytest plugin for NeMo-RL's own tests in one process: no Ray cluster with a dashboard, and nobody watching its GPUs."""

import importlib
from unittest.mock import MagicMock

importlib.import_module("nemo_rl.distributed.virtual_cluster").init_ray = lambda *_, **__: None
importlib.import_module("nemo_rl.utils.logger").RayGpuMonitorLogger = MagicMock()
