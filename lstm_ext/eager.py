"""The layer inside a torch.compile region: a graph break, since the core works on raw addresses.

Loaded only there: torch.compiler.disable brings in the whole compiler.
"""

import torch

from lstm_ext.autograd import eager_layer

lstm_layer = torch.compiler.disable(eager_layer)
