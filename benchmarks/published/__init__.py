"""ProbMoE's routing step by step as its authors publish it, in plain torch: what our speed is measured against.

The paper is arXiv 2606.01509, the code the public repository HengHugoZhao/ProbMoE. It has the dynamic program over a
chain of experts, and a circuit in two forms: differentiated by autograd, or walked up and down once. All three are
here. They take the published steps whether or not one could be spared; where a step is left out or replaced by a
cheaper one, the docstring says so. What the same method costs without the steps that can be spared is in
`benchmarks.peers`.

Marginals are derivatives at a fixed ``log(1 - p)``. The chain and the differentiated circuit hold it fixed in the
derivative of the marginals, too: what reaches a logit r through them is ``1 - sigmoid(r)`` times that of
`probmoe_ext.ops.route_probmoe`. The third form has the gradient of ours.
"""

from benchmarks.published.chain import route_by_chain
from benchmarks.published.differentiated_circuit import route_by_differentiated_circuit
from benchmarks.published.walked_circuit import route_by_walked_circuit

__all__ = ["route_by_chain", "route_by_differentiated_circuit", "route_by_walked_circuit"]
