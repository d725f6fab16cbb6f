"""Runs a script under FSDP2 on CPUs: `torchrun fsdp_on_cpu.py SCRIPT FLAGS...`.

Accelerate offers FSDP on accelerators only, although PyTorch's own runs on gloo; nothing else is different here but
the end. gloo's threads may still hold tensors of the last gather, and one that lets go of them while the interpreter
shuts down aborts the process (pytorch/pytorch#179291): a script that has ended well ends without that shutdown.
"""

import os
import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

os.environ |= {  # what `accelerate launch --config_file training/recipes/gpu-8-fsdp.yaml` sets
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


if __name__ == "__main__":
    AcceleratorState.__init__ = with_fsdp
    sys.argv.pop(0)
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
