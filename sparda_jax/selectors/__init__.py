# Copyright 2026 The sparda_jax authors
# SPDX-License-Identifier: Apache-2.0
"""Selectors: methods that rank the KV blocks of a layer, one file each, found by name."""

from sparda_jax.selectors.base import Decoder as Decoder
from sparda_jax.selectors.base import KeySummary as KeySummary
from sparda_jax.selectors.base import Probe as Probe
from sparda_jax.selectors.base import Selector as Selector
from sparda_jax.selectors.base import Source as Source
from sparda_jax.selectors.base import get as get
from sparda_jax.selectors.base import names as names
from sparda_jax.selectors.base import register as register
from sparda_jax.selectors.base import resolve as resolve
from sparda_jax.selectors.forecast import ForecastSelector as ForecastSelector
from sparda_jax.selectors.nosa import NosaSelector as NosaSelector
from sparda_jax.selectors.previous_query import PreviousQuerySelector as PreviousQuerySelector
from sparda_jax.selectors.query import QuerySelector as QuerySelector
from sparda_jax.selectors.random import RandomSelector as RandomSelector
