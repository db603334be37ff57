"""Who carries out work that falls into tasks: this process, or the owner's own machines by Ray.

`tasks` is what the work sees, `onray` the cluster.  All that must happen once stays with who hands tasks out.
`onserve` keeps servers running there, by Ray Serve.
"""
