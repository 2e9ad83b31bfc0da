"""Films read and written: frames, timestamps, luma, other streams."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.films import TIMES, made

from lineament.core.checks import InputError
from lineament.load.film_frames import chroma_of, luma_of
from lineament.load.picture_films import PictureFilm, picture_folder, read_picture
from lineament.load.video import Film
from lineament.load.video_writing import planned


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="the extra 'video' is not installed")


def rewritten(film: Film, path: Path, codec: str = "ffv1", colour=(0.5, 0.5, 0.5)) -> list[str]:
    """The film with one colour everywhere; what could not be kept."""
    output = planned(film, path, codec=codec)
    output.write(lambda frame: output.planes(frame, torch.tensor(colour).expand(*frame.grey.shape, 3)))
    return list(output.notes)


@pytest.mark.parametrize(
    "layout", ["yuv420p", "yuv420p10le", "gray", "yuv444p", "yuv422p12le", "yuv444p16le"]
)
def test_luma_times_and_sound_stay(av, tmp_path, layout):
    film = Film(made(av, tmp_path / "in.mkv", layout))
    before = list(film.frames())
    assert (
        not film.gaps
        and before[0].depth == int(layout.partition("p")[2][:-2] or 8)
        and film.length == len(TIMES)
    )
    assert rewritten(film, tmp_path / "out.mkv") == []
    after = list(Film(tmp_path / "out.mkv").frames())
    assert [frame.pts for frame in after] == TIMES
    assert all(np.array_equal(a.luma, b.luma) for a, b in zip(before, after))
    with av.open(str(tmp_path / "out.mkv")) as out, av.open(str(tmp_path / "in.mkv")) as source:
        assert out.metadata["title"] == "a film" and out.streams[0].type == "video"
        packets = [
            [bytes(packet) for packet in one.demux(one.streams.audio[0]) if packet.size]
            for one in (source, out)
        ]
        assert packets[0] and packets[0] == packets[1]


def test_odd_sizes_and_times_in_other_containers(av, tmp_path):
    film = Film(made(av, tmp_path / "in.mkv", "yuv444p", size=(63, 47)))
    assert rewritten(film, tmp_path / "out.mp4", "libx264") == []
    with av.open(str(tmp_path / "out.mp4")) as out:
        video = out.streams.video[0]
        times = [round(1000 * float(frame.pts * video.time_base)) for frame in out.decode(video)]
    assert times == TIMES


def test_what_is_no_film_says_so(av, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no film" * 50)
    with pytest.raises(InputError, match="cannot be read as a video"):
        list(Film(tmp_path / "bad.mp4").frames())
    with pytest.raises(InputError, match="is no file"):
        list(Film(tmp_path / "none.mp4").frames())
    film = Film(made(av, tmp_path / "in.mkv"))
    with pytest.raises(InputError, match="'ffv1'"):
        planned(film, tmp_path / "out.mkv", codec="no_such_codec")
    assert not (tmp_path / "out.mkv").exists()


def test_chroma_and_luma_of_grey_and_primaries():
    grey = torch.full((1, 1, 3), 0.3, dtype=torch.float64)
    for matrix in (1, 6, 9):
        assert [round(float(x), 12) for x in chroma_of(grey, matrix)] == [0.5, 0.5]
        assert float(luma_of(grey, matrix)) == pytest.approx(0.3)
        red = torch.tensor([[[1.0, 0.0, 0.0]]])
        assert float(chroma_of(red, matrix)[1]) == pytest.approx(1)


def test_pictures_come_in_natural_order(tmp_path):
    for name in ("f10.png", "f2.png", "f1.png"):
        Image.new("L", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in picture_folder(tmp_path)] == ["f1.png", "f2.png", "f10.png"]


def test_a_turned_film_is_coloured_upright_and_stays_turned(av, tmp_path):
    film = Film(made(av, tmp_path / "in.mp4", codec="libx264", rotation=90))
    [first, *_] = film.frames()
    assert first.turns == 1 and first.luma.shape == (48, 64) and first.grey.shape == (64, 48)
    output = planned(film, tmp_path / "out.mkv", codec="ffv1")
    rgb = torch.full((64, 48, 3), 0.5)
    rgb[:32, :, 0] = 1  # the upper half, as one sees it, is red
    output.write(lambda frame: output.planes(frame, rgb))
    with av.open(str(tmp_path / "out.mkv")) as out:
        frame = next(out.decode(out.streams.video[0]))
    assert frame.rotation == 90
    cr = np.rot90(frame.to_ndarray(format="yuv444p")[2])
    assert cr[:30].min() > 150 and cr[34:].max() < 140


@pytest.mark.parametrize(
    ("layout", "codec", "to", "notes"),
    [
        ("yuva420p", "ffv1", "ffv1", []),
        ("yuva444p10le", "ffv1", "prores_ks", []),
        ("yuva420p", "ffv1", "libx264", ["alpha is left out: libx264 holds none"]),
        ("yuv420p12le", "ffv1", "libx264", ["luma of 12 bits is cut to 10"]),
    ],
)
def test_alpha_and_bits_stay_where_the_codec_can(av, tmp_path, layout, codec, to, notes):
    film = Film(made(av, tmp_path / "in.mkv", layout, codec, sound=None))
    found = rewritten(film, tmp_path / "out.mkv", to)
    assert len(found) == len(notes) and all(note.startswith(n) for note, n in zip(found, notes))
    before, after = next(film.frames()), next(Film(tmp_path / "out.mkv").frames())
    assert (after.alpha is not None) == ("a" in layout and not notes)
    assert after.depth >= before.depth or notes
    if to == "ffv1":
        assert np.array_equal(before.luma, after.luma) and np.array_equal(before.alpha, after.alpha)


@pytest.mark.parametrize("layout", ["bgr0", "pal8"])
def test_films_of_rgb_have_the_luma_of_their_pictures(av, tmp_path, layout):
    from tests.films import greys

    if layout == "pal8":
        Image.fromarray(greys(1, (64, 48))[0]).save(tmp_path / "in.gif")
        film = Film(tmp_path / "in.gif")
    else:
        film = Film(made(av, tmp_path / "in.mkv", layout))
    [frame, *_] = film.frames()
    grey = torch.from_numpy(greys(len(TIMES) if layout == "bgr0" else 1, (64, 48))[0]) / 255
    assert (frame.grey - grey).abs().max() < 0.01


def test_what_no_frame_of_the_film_can_be_is_refused(av, tmp_path, monkeypatch):
    cases = {
        "is HDR (PQ)": made(av, tmp_path / "hdr.mkv", "yuv420p10le", color_trc=16),
        "is interlaced": made(av, tmp_path / "i.mp4", codec="libx264", options={"x264-params": "tff=1"}),
    }
    small, large = (
        made(av, tmp_path / f"{w}.ts", codec="libx264", size=(w, 48), sound=None) for w in (64, 96)
    )
    cases["changes its size at frame 5, from 64 x 48 to 96 x 48"] = tmp_path / "both.ts"
    deep = made(av, tmp_path / "deep.ts", "yuv420p10le", codec="libx264", sound=None)
    cases["changes its format at frame 5, from 8 bits of limited range"] = tmp_path / "bits.ts"
    (tmp_path / "bits.ts").write_bytes(small.read_bytes() + deep.read_bytes())
    (tmp_path / "both.ts").write_bytes(small.read_bytes() + large.read_bytes())
    with av.open(str(tmp_path / "sound.mkv"), "w") as out, av.open(str(cases["is HDR (PQ)"])) as source:
        heard = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = heard
                out.mux(packet)
    cases["has no video stream"] = tmp_path / "sound.mkv"
    later = made(av, tmp_path / "i.ts", codec="libx264", options={"x264-params": "tff=1"}, sound=None)
    cases["is interlaced at frame 5"] = tmp_path / "later.ts"
    (tmp_path / "later.ts").write_bytes(small.read_bytes() + later.read_bytes())
    cases["has frames of 96 x 48, expected at most"] = large
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    cases["cannot be read as a video"] = tmp_path / "list.m3u8"
    for says, path in cases.items():
        # A frame that claims more than all films may have is not made room for.
        monkeypatch.setattr("lineament.load.video.LARGEST", 64 * 48 if path == large else 10**6)
        with pytest.raises(InputError) as refused:
            list(Film(path).frames())
        assert says in str(refused.value), (says, refused.value)


def test_sound_that_the_container_cannot_hold_is_said_before(av, tmp_path):
    film = Film(made(av, tmp_path / "in.mkv"))
    with pytest.raises(InputError, match=r"out: \.webm holds no aac sound"):
        planned(film, tmp_path / "out.webm", codec="libvpx-vp9")
    with pytest.raises(InputError, match=r"out: \.webm holds no ffv1"):
        planned(film, tmp_path / "out.webm", codec="ffv1")
    with pytest.raises(InputError, match="codec: 'gif' stores no plane of luma"):
        planned(film, tmp_path / "out.mkv", codec="gif")
    with pytest.raises(InputError, match=r"'\.xyz' is no video's ending"):
        planned(film, tmp_path / "out.xyz")
    with pytest.raises(InputError, match=r"out: \.avi does not keep the times of frames"):
        planned(film, tmp_path / "out.avi")
    # Only what an encoder or a container says when it is opened tells of these.
    with pytest.raises(InputError, match="codec: 'mjpeg' cannot write frames of 64 x 48"):
        planned(film, tmp_path / "out.mkv", codec="mjpeg")
    for sound, ending in {"flac": ".mov", "pcm_s16le": ".mp4"}.items():
        film = Film(made(av, tmp_path / f"{sound}.mkv", sound=sound))
        with pytest.raises(InputError, match=rf"out: \{ending} holds no {sound} sound"):
            planned(film, tmp_path / f"out{ending}")


def test_sound_that_a_transport_stream_holds_goes_with_it(av, tmp_path):
    assert rewritten(Film(made(av, tmp_path / "in.mkv")), tmp_path / "out.ts", "libx264") == []
    with av.open(str(tmp_path / "out.ts")) as out:
        assert [stream.type for stream in out.streams] == ["video", "audio"]


def test_alpha_beside_the_frames_is_said_to_be_left_out(av, tmp_path):
    film = Film(made(av, tmp_path / "in.webm", "yuva420p", codec="libvpx-vp9", sound=None))
    assert any(note.startswith("alpha is left out") for note in planned(film, tmp_path / "out.mkv").notes)


@pytest.mark.parametrize("length", [188, 192])
def test_a_transport_stream_that_ends_within_a_packet_is_named(av, tmp_path, length):
    whole = made(av, tmp_path / "in.ts", codec="libx264", times=range(0, 800, 40), sound=None).read_bytes()
    # With four bytes of a clock before each packet, as cameras write it.
    parts = [bytes(length - 188) + whole[k : k + 188] for k in range(0, len(whole), 188)]
    (tmp_path / "whole.ts").write_bytes(b"".join(parts))
    (tmp_path / "cut.ts").write_bytes(b"".join(parts[: len(parts) * 3 // 4])[:-50])
    for name, gap in {"whole": [], "cut": ["the file ends within a packet"]}.items():
        film = Film(tmp_path / f"{name}.ts")
        assert film.length > 2 and all(any(g in told for told in film.gaps) for g in gap)
        assert bool(film.gaps) == bool(gap)


@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_what_cannot_be_decoded_is_named(av, tmp_path, codec):
    whole = made(av, tmp_path / "in.mkv", codec=codec, times=range(0, 2000, 40), sound=None)
    count, data = Film(whole).length, whole.read_bytes()
    for name, bad in {
        "cut": data[: len(data) * 4 // 5],
        "holes": data[: len(data) * 4 // 5] + bytes(200) + data[len(data) * 4 // 5 + 200 :],
    }.items():
        path = tmp_path / f"{name}.mkv"
        path.write_bytes(bad)
        film = Film(path)
        found = list(film.frames())
        assert film.gaps and 10 < len(found) <= count, (name, film.gaps, len(found))
        assert all(a.pts < b.pts for a, b in pairwise(found))
    assert Film(whole).gaps == [] and count == 50


def _packets(av, path):
    with av.open(str(path)) as film:
        return [(p.pos, p.size) for p in film.demux(video=0) if p.size]


def test_frames_whose_checksums_are_wrong_are_named(av, tmp_path):
    """FFV1's decoder patches their slices and says nothing; of a film without checksums nothing is said."""
    told = {}
    for name, options in {
        "with": {"level": "3", "slicecrc": "1"},
        "without": {"level": "3", "slicecrc": "0"},
    }.items():
        whole = made(
            av, tmp_path / f"{name}.mkv", times=range(0, 800, 40), sound=None, options=options, size=(160, 96)
        )
        assert Film(whole).length == 20
        data = bytearray(whole.read_bytes())
        for k in (5, 6, 7, 12):
            position, size = _packets(av, whole)[k]
            for at in range(position + size // 3, position + size // 3 + 4):
                data[at] ^= 0x5A
        whole.write_bytes(data)
        film = Film(whole)
        assert film.length == 20
        told[name] = film.gaps
    assert told == {"with": ["frames 5 to 7, 12 are damaged"], "without": []}


def test_one_lost_frame_is_named(av, tmp_path):
    """A packet that decodes to nothing, between frames that do."""
    path = made(
        av, tmp_path / "in.mkv", codec="mjpeg", layout="yuvj420p", times=range(0, 800, 40), sound=None
    )
    data = bytearray(path.read_bytes())
    position, size = _packets(av, path)[7]
    data[position : position + size] = bytes(size)
    path.write_bytes(data)
    film = Film(path)
    assert film.length == 19 and "after frame 6: 0.08 s without a frame" in film.gaps


@pytest.mark.parametrize(
    ("name", "codec"),
    [("in.mkv", "ffv1"), ("in.mkv", "libx264"), ("in.mp4", "libx264"), ("in.ts", "libx264")],
)
def test_a_pause_is_no_gap_and_what_was_lost_in_one_is(av, tmp_path, name, codec):
    """A recorder that paused leaves a jump in the times; so does a reader that steps over damage."""
    times = [*range(0, 1200, 40), *range(2800, 4000, 40)]
    film = Film(made(av, tmp_path / name, codec=codec, times=times, options={"g": "10"}, size=(160, 96)))
    assert film.length == 60 and film.gaps == []
    if name == "in.mkv":
        data = film.path.read_bytes()
        hole = range(len(data) // 4, len(data) // 4 + len(data) // 6)
        film.path.write_bytes(data[: hole.start] + bytes(len(hole)) + data[hole.stop :])
        assert film.length < 55
        seconds = [line for line in film.gaps if "s without a frame" in line]
        assert len(seconds) == 1 and int(seconds[0].split()[2][:-1]) < 29, film.gaps


@pytest.mark.parametrize("codec", ["ffv1", "mpeg4"])
def test_a_pause_in_a_container_with_a_chunk_for_each_tick(av, tmp_path, codec):
    """AVI fills a pause with empty chunks, of a clock of milliseconds more bytes than small frames have."""
    with av.open(str(tmp_path / "in.avi"), "w") as out:
        video = out.add_stream(codec, rate=1000)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for time in [*range(0, 400, 40), *range(1600, 2000, 40)]:
            flat = np.full((48, 64, 3), time % 200, np.uint8)
            frame = av.VideoFrame.from_ndarray(flat, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    film = Film(tmp_path / "in.avi")
    assert film.length == 20 and film.gaps == []


def test_times_that_are_missing_are_made_and_edit_lists_are_kept(av, tmp_path):
    bare = Film(made(av, tmp_path / "in.h264", codec="libx264", sound=None))
    times = [frame.pts for frame in bare.frames()]
    assert len(times) == len(TIMES) and all(a < b for a, b in pairwise(times))
    # B frames: the first is shown after it is decoded, which an edit list mends.
    film = Film(
        made(
            av, tmp_path / "in.mp4", codec="libx264", times=range(0, 800, 40), sound=None, options={"bf": "2"}
        )
    )
    assert rewritten(film, tmp_path / "out.mkv") == []
    base = film.format.time_base
    assert [round(1000 * float(f.pts * base)) for f in film.frames()] == list(range(0, 800, 40))
    assert [f.pts for f in Film(tmp_path / "out.mkv").frames()] == list(range(0, 800, 40))


def test_subtitles_chapters_and_a_second_picture(av, tmp_path):
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:00,100\nhello\n")
    film = made(av, tmp_path / "in.mkv")
    with (
        av.open(str(tmp_path / "full.mkv"), "w") as out,
        av.open(str(film)) as source,
        av.open(str(tmp_path / "a.srt")) as words,
    ):
        streams = [*source.streams, words.streams[0], source.streams.video[0]]
        copies = [out.add_stream_from_template(stream) for stream in streams]
        out.set_chapters(
            [{"id": 1, "start": 0, "end": 100, "time_base": Fraction(1, 1000), "metadata": {"title": "one"}}]
        )
        packets = [
            (p, c)
            for p in source.demux()
            for c in ([copies[0], copies[3]] if p.stream.type == "video" else [copies[1]])
        ]
        packets += [(p, copies[2]) for p in words.demux()]
        for packet, copy in packets:
            if packet.dts is not None:
                packet.stream = copy
                out.mux(packet)
    assert rewritten(Film(tmp_path / "full.mkv"), tmp_path / "out.mkv") == [
        "a second video stream (ffv1, such as a cover picture) is left out"
    ]
    with av.open(str(tmp_path / "out.mkv")) as out:
        assert [stream.type for stream in out.streams] == ["video", "audio", "subtitle"]
        assert [bytes(p) for p in out.demux(out.streams[2]) if p.size] == [b"hello"]
        assert out.chapters()[0]["metadata"]["title"] == "one"
    notes = rewritten(Film(tmp_path / "full.mkv"), tmp_path / "out.mp4", "libx264")
    assert "the subtitle stream (srt) is left out: .mp4 cannot hold it" in notes


@pytest.mark.parametrize("name", ["a:b.mkv", "100%d.mkv", "two\nlines.mkv", "-i.mkv"])
def test_names_that_mean_something_elsewhere(av, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    made(av, tmp_path / "in.mkv").rename(tmp_path / name)
    assert rewritten(Film(name), Path(f"out {name}")) == []
    assert Film(f"out {name}").length == len(TIMES)


def test_a_folder_becomes_a_video_with_the_values_of_its_greys(av, tmp_path):
    from tests.films import greys

    for index, grey in enumerate(greys(3, (64, 48))):
        Image.fromarray(grey).save(tmp_path / f"{index + 8}.png")
    film = PictureFilm(tmp_path, Fraction(24))
    assert rewritten(film, tmp_path / "out.mkv") == []
    found = list(Film(tmp_path / "out.mkv").frames())
    assert [frame.full_range for frame in found] == [True] * 3
    assert all(np.array_equal(frame.luma, grey) for frame, grey in zip(found, greys(3, (64, 48))))
    with av.open(str(tmp_path / "out.mkv")) as out:
        assert out.streams.video[0].average_rate == 24
    Image.new("L", (64, 47)).save(tmp_path / "11.png")
    with pytest.raises(InputError, match=r"film: '11.png' is 64 x 47, '8.png' is 64 x 48"):
        PictureFilm(tmp_path)


def test_planes_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (8, 12), dtype=np.uint8)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack([grey] * 3 + [grey]), "RGBA")
    turned = Image.fromarray(np.rot90(grey).copy())
    turned.getexif()[0x0112] = 6
    for name, picture in {"a": deep, "b": clear}.items():
        picture.save(tmp_path / f"{name}.png")
    turned.save(tmp_path / "c.png", exif=turned.getexif())
    frames = [next(PictureFilm(only(tmp_path, name)).frames()) for name in ("a.png", "b.png")]
    assert frames[0].depth == 16 and np.array_equal(frames[0].luma, grey.astype(np.uint16) * 257)
    assert np.array_equal(frames[1].luma, grey) and np.array_equal(frames[1].alpha, grey)
    assert np.array_equal(np.asarray(read_picture("film", tmp_path / "c.png")), grey)


def only(folder: Path, name: str) -> Path:
    """A folder of one picture."""
    (folder / f"only {name}").mkdir()
    return (folder / name).rename(folder / f"only {name}" / name).parent
