"""torchao: a policy as its per-layer configuration, a packed model as its tensors, and a PT2E quantizer.

For people who deploy with torchao: ExecuTorch, vLLM, torch.compile.
"""

from hq_plugin.errors import EngineError

try:
    from hq_plugin.integrations.torchao.config import torchao_config
    from hq_plugin.integrations.torchao.quantizer import HybridQuantizer
    from hq_plugin.integrations.torchao.tensors import to_torchao
except ImportError as error:
    raise EngineError(f"{error}. Install what torchao needs: pip install 'hq-plugin[torchao]'.") from error

__all__ = ["HybridQuantizer", "to_torchao", "torchao_config"]
