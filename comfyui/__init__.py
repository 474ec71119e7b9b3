"""d2m's nodes for ComfyUI: images in, images out, a bundle between (docs/comfyui.md).

This folder is linked or copied into ComfyUI/custom_nodes; d2m itself is installed into ComfyUI's
Python. In reading order:

nodes.py   the nodes
bundles.py what ComfyUI's folders hold: bundles and LoRAs, by name
data.py    ComfyUI's IMAGE and MASK tensors to numpy and back; progress and its Cancel button
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
