"""Plans for machines that are not there: does a run fit, what does it send, how fast can it be?

`whole.plan` compiles the phases of `programs`; `phase` reads each of them by `compiled` and
`collectives` against the limits in `chips`; `meshes` searches, `advice` and `page` say it.
"""
