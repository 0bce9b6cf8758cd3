"""The hand-written bytes of a message are those of protobuf."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from grokmoe.v1 import generation_pb2 as pb
from router.token_message import TokenMessages

NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))


@given(
    request_id=st.text(max_size=200),
    index=NUMBERS,
    text=st.text(max_size=300),
    token_ids=st.lists(NUMBERS, max_size=100),
    usage=st.tuples(NUMBERS, NUMBERS, NUMBERS),
)
@settings(deadline=None)
def test_as_protobuf_writes_it(request_id, index, text, token_ids, usage):
    prompt, cached, completion = usage
    expected = pb.StreamGenerateResponse(
        request_id=request_id,
        index=index,
        text_delta=text,
        token_ids=token_ids,
        usage=pb.Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion),
    )
    written = TokenMessages(request_id, index, prompt).encode(text, token_ids, cached, completion)
    assert written == expected.SerializeToString()
