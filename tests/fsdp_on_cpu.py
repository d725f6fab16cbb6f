"""FSDP2 on CPUs: accelerate offers it on accelerators only, although PyTorch's own runs on gloo."""

import os

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def enable() -> None:
    """What `accelerate launch --config_file training/recipes/gpu-8-fsdp.yaml` sets; past the check in the way."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "SparEncoderLayer",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    original = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.distributed_type = DistributedType.FSDP
        if fsdp_plugin is not None:  # later instances share the state of the first and get none
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp
