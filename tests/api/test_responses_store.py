"""The store of responses: its bounds hold whatever is put in, tenants never meet, and items live as long as a response holds them."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.api.responses_store import Item, ResponseStore, Stored, StoreLimits


def response(name: str, inputs: Sequence[Item] = (), outputs: Sequence[Item] = (), body: bytes = b"{}") -> Stored:
    return Stored(name, body, tuple(inputs), tuple(outputs))


def item(name: str, size: int = 10) -> Item:
    return Item(name, b"x" * size)


def test_tenants_see_their_own_alone() -> None:
    store = ResponseStore()
    store.put("a", response("resp_1", [item("msg_1")]))
    assert store.get("a", "resp_1") is not None
    assert store.item("a", "msg_1") == item("msg_1")
    assert store.get("b", "resp_1") is None
    assert store.item("b", "msg_1") is None
    assert not store.delete("b", "resp_1")
    assert store.delete("a", "resp_1")
    assert not store.delete("a", "resp_1")
    assert (store.num_responses, store.num_bytes) == (0, 0)


def test_what_was_used_last_stays() -> None:
    store = ResponseStore(StoreLimits(max_responses=2))
    store.put("a", response("resp_1"))
    store.put("a", response("resp_2"))
    assert store.get("a", "resp_1") is not None
    store.put("a", response("resp_3"))
    assert store.get("a", "resp_2") is None
    assert store.get("a", "resp_1") is not None
    assert store.get("a", "resp_3") is not None


def test_a_flood_of_one_tenant_costs_the_other_nothing() -> None:
    store = ResponseStore(StoreLimits(max_bytes=100_000))
    store.put("quiet", response("resp_0", body=b"x" * 5000))
    for number in range(200):
        store.put("loud", response(f"resp_{number}", body=b"x" * 5000))
    assert store.get("quiet", "resp_0") is not None
    assert store.num_bytes <= 100_000


def test_shared_items_count_once_and_stay_while_held() -> None:
    store = ResponseStore()
    first, second = item("msg_1", 10_000), item("msg_2", 10_000)
    store.put("a", response("resp_1", [first], [second]))
    one = store.num_bytes
    # Equal items that came from elsewhere are the same bytes afterwards.
    store.put("a", response("resp_2", [item("msg_1", 10_000), item("msg_2", 10_000), item("msg_3")]))
    assert store.num_bytes < one + 4000
    held = store.get("a", "resp_2")
    assert held is not None
    assert held.inputs[0].data is first.data
    store.delete("a", "resp_1")
    assert store.item("a", "msg_1") == first
    assert store.num_bytes > 20_000
    store.delete("a", "resp_2")
    assert store.item("a", "msg_1") is None
    assert store.num_bytes == 0


def test_one_that_is_too_large_is_not_kept_and_evicts_nothing() -> None:
    store = ResponseStore(StoreLimits(max_bytes=10_000))
    store.put("a", response("resp_1"))
    store.put("a", response("resp_2", body=b"x" * 10_001))
    store.put("a", response("resp_3", [item("msg_1", 10_001)]))
    assert store.get("a", "resp_1") is not None
    assert store.num_responses == 1
    off = ResponseStore(StoreLimits(max_responses=0))
    off.put("a", response("resp_1"))
    assert off.num_responses == 0


class Machine(RuleBasedStateMachine):
    """Puts, deletes and reads in any order; bytes are counted anew from what is really held."""

    limits = StoreLimits(max_responses=6, max_bytes=20_000)

    def __init__(self) -> None:
        super().__init__()
        self.store = ResponseStore(self.limits)
        self.num_put = 0

    tenants = st.sampled_from(["", "a", "b"])
    items = st.lists(st.builds(item, st.sampled_from(["m1", "m2", "m3", "m4"]), st.sampled_from([1, 500, 3000])), max_size=4)

    @rule(tenant=tenants, inputs=items, outputs=items, size=st.integers(0, 8000))
    def put(self, tenant: str, inputs: list[Item], outputs: list[Item], size: int) -> None:
        self.num_put += 1
        self.store.put(tenant, response(f"resp_{self.num_put}", inputs, outputs, b"x" * size))

    @precondition(lambda self: self.num_put)
    @rule(tenant=tenants, data=st.data())
    def get(self, tenant: str, data: st.DataObject) -> None:
        name = f"resp_{data.draw(st.integers(1, self.num_put))}"
        found = self.store.get(tenant, name)
        assert found is None or found.id == name

    @precondition(lambda self: self.num_put)
    @rule(tenant=tenants, data=st.data())
    def delete(self, tenant: str, data: st.DataObject) -> None:
        name = f"resp_{data.draw(st.integers(1, self.num_put))}"
        was_there = self.store.get(tenant, name) is not None
        assert self.store.delete(tenant, name) == was_there
        assert self.store.get(tenant, name) is None

    @invariant()
    def bounds_hold(self) -> None:
        assert self.store.num_responses <= self.limits.max_responses
        assert self.store.num_bytes <= self.limits.max_bytes
        for shelf in self.store._shelves.values():
            held = [each for stored in shelf.responses.values() for each in stored.items]
            assert {each: count for each, (_, count) in shelf.held.items()} == {each: held.count(each) for each in held}
            assert set(shelf.by_id) <= {each.id for each in held}
            assert shelf.num_bytes >= sum(len(each.data) for each in set(held)) + sum(len(each.body) for each in shelf.responses.values())
            if not shelf.responses:
                assert shelf.num_bytes == 0


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
