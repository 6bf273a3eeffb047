"""Rollouts: moving an endpoint from one assignment to the next, in waves that stop by themselves.

`plan`, `statistics` and `verdict` decide over frozen values; `service` writes what people and
policies ask for; `runner` carries it out.
"""
