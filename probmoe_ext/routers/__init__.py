"""Routers: what turns hidden states into experts. One small file each, found by name; no Hugging Face import here."""

from __future__ import annotations

from probmoe_ext.routers.adamoe import AdaMoERouter
from probmoe_ext.routers.auxiliary import aux_losses, watch_loss
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.calibration import (
    annealed_concentration,
    annealed_temperature,
    calibrate_concentration,
    calibrate_ratio,
    mean_simpson,
)
from probmoe_ext.routers.controlled_top_p import ControlledTopPRouter
from probmoe_ext.routers.da_moe import DAMoERouter
from probmoe_ext.routers.densemixer import DenseMixerRouter
from probmoe_ext.routers.dirmoe import DirMoERouter, set_concentration, set_temperature
from probmoe_ext.routers.expert_choice import ExpertChoiceRouter
from probmoe_ext.routers.gumbel_softmax import GumbelSoftmaxRouter
from probmoe_ext.routers.hash import HashRouter
from probmoe_ext.routers.lory import LoryRouter
from probmoe_ext.routers.losses import entropy_loss, load_balancing_loss, variation_loss, z_loss
from probmoe_ext.routers.moepp import MoEPlusPlusRouter
from probmoe_ext.routers.noisy_topk import NoisyTopKRouter
from probmoe_ext.routers.probmoe import ProbMoERouter
from probmoe_ext.routers.registry import available_routers, make_router, register_router, router_class, router_options
from probmoe_ext.routers.remoe import ReMoERouter
from probmoe_ext.routers.simple import SimpleRouter
from probmoe_ext.routers.sparsemixer import SparseMixerRouter, SparseMixerV2Router
from probmoe_ext.routers.straight_through import StraightThroughRouter
from probmoe_ext.routers.switch import SwitchRouter, dropped_tokens
from probmoe_ext.routers.target import TargetRouter
from probmoe_ext.routers.thor import ThorRouter
from probmoe_ext.routers.top_p import TopPRouter
from probmoe_ext.routers.topk import TopKRouter
from probmoe_ext.routers.topk_softmax import TopKSoftmaxRouter

__all__ = [
    "AdaMoERouter",
    "ControlledTopPRouter",
    "DAMoERouter",
    "DenseMixerRouter",
    "DirMoERouter",
    "ExpertChoiceRouter",
    "ExpertsPerToken",
    "GumbelSoftmaxRouter",
    "HashRouter",
    "LoryRouter",
    "MoEPlusPlusRouter",
    "NoisyTopKRouter",
    "ProbMoERouter",
    "ReMoERouter",
    "Router",
    "SimpleRouter",
    "SparseMixerRouter",
    "SparseMixerV2Router",
    "StraightThroughRouter",
    "SwitchRouter",
    "TargetRouter",
    "ThorRouter",
    "TopKRouter",
    "TopKSoftmaxRouter",
    "TopPRouter",
    "annealed_concentration",
    "annealed_temperature",
    "aux_losses",
    "available_routers",
    "calibrate_concentration",
    "calibrate_ratio",
    "dropped_tokens",
    "entropy_loss",
    "load_balancing_loss",
    "make_router",
    "mean_simpson",
    "register_router",
    "router_class",
    "router_options",
    "set_concentration",
    "set_temperature",
    "variation_loss",
    "watch_loss",
    "z_loss",
]
