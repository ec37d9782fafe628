"""The embedded task: typed requests to a household assistant, turned into function calls."""

from fedloom.simulations.household.general import general_examples
from fedloom.simulations.household.grammar import Example
from fedloom.simulations.household.households import Household, household

__all__ = ["Example", "Household", "general_examples", "household"]
