"""Tests of the compiled ops. `SPECS` lists every op, family by family."""

from __future__ import annotations

from tests.ops import dirichlet_specs, gumbel_specs, route_specs, subset_specs

SPECS = [*subset_specs.SPECS, *route_specs.SPECS, *dirichlet_specs.SPECS, *gumbel_specs.SPECS]
