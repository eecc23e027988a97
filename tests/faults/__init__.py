"""What may go wrong between processes and on disks, and what the store looks like afterwards.

``test_kills`` kills refreshes at seeded points of every stage; ``test_disk``, ``test_damage``, ``test_pool``
and ``test_clock`` are the other faults, ``test_processes`` is two processes on one store. `children` runs a
function in a process of its own within milliseconds, `standin` is a target model without weights, `bench` a
pool and its store, `kills` ends a process at a chosen point, and `invariants` says what must hold of a store
at any time.
"""
