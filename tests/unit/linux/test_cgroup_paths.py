from __future__ import annotations

import errno
import os

import pytest

from pybpfthrottle.errors import CgroupError, ProcessError
from pybpfthrottle.linux import cgroup, libc, tables
from pybpfthrottle.linux.cgroup import Cgroup, Mount

V2 = "30 24 0:27 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = """\
24 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 24 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,name=systemd
33 30 0:29 / /sys/fs/cgroup/memory rw,nosuid shared:12 - cgroup cgroup rw,memory
"""


@pytest.fixture
def mounted(monkeypatch):
    """Puts a mount table in place of this process's own: text, or what was parsed."""

    def put(*table):
        lines = [
            cgroup.parse_mount(line) if isinstance(line, str) else line
            for part in table
            for line in (part.splitlines() if isinstance(part, str) else [part])
        ]
        monkeypatch.setattr(cgroup, "mounts", lambda: lines)

    return put


@pytest.fixture
def files(monkeypatch):
    """Puts bytes in place of files of /proc, for the modules that are tested."""
    contents = {}

    def fake_contents(path):
        if path not in contents:
            raise FileNotFoundError(2, "No such file or directory", path)
        return contents[path]

    monkeypatch.setattr(tables, "contents", fake_contents)
    return contents


@pytest.fixture
def tree(tmp_path, mounted):
    """A directory in place of the mounted cgroup2 file system."""

    def make(*paths):
        for path in paths:
            (tmp_path / path).mkdir(parents=True)
        device = os.stat(tmp_path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        mounted(Mount(number, "/", str(tmp_path), "cgroup2"))
        return tmp_path

    return make


def test_a_line_of_the_mount_table():
    """A line gives the device, the root, the path and the type."""
    assert cgroup.parse_mount(V2) == Mount("0:27", "/", "/sys/fs/cgroup", "cgroup2")


@pytest.mark.parametrize("optional", ["", "shared:4 ", "shared:4 master:2 propagate_from:1 "])
def test_optional_fields_end_at_the_hyphen(optional):
    """There may be any number of optional fields before the type."""
    line = f"30 24 0:27 / /mnt rw {optional}- cgroup2 none rw"
    assert cgroup.parse_mount(line).type == "cgroup2"


def test_a_path_that_is_a_hyphen_ends_nothing():
    """Only a hyphen after the fixed fields ends the optional ones."""
    line = "30 24 0:27 - - rw shared:4 - cgroup2 none rw"
    assert cgroup.parse_mount(line) == Mount("0:27", "-", "-", "cgroup2")


@pytest.mark.parametrize(
    ("escaped", "path"),
    [
        (r"/a\040b", "/a b"),
        (r"/a\011b\012c", "/a\tb\nc"),
        (r"/a\134b", "/a\\b"),
        (r"/a\134040b", r"/a\040b"),
        (r"/a\134134b", r"/a\134b"),
        ("/größe", "/größe"),
        ("/a\u00a0b", "/a\u00a0b"),
        ("/a\u3000-\u3000b", "/a\u3000-\u3000b"),
    ],
)
def test_escapes_in_paths(escaped, path):
    """Space, tab, newline and backslash come escaped; other characters are as they are."""
    mount = cgroup.parse_mount(f"30 24 0:27 {escaped} {escaped} rw - cgroup2 none rw")
    assert (mount.root, mount.path, mount.type) == (path, path, "cgroup2")


def test_a_mount_point_that_is_no_text_does_not_matter(files):
    """A path that is no UTF-8, as on some memory stick, does not hide the other mounts."""
    files["/proc/self/mountinfo"] = (
        b"29 24 8:17 / /media/gr\xf6\xdfe rw - vfat /dev/sdb1 rw\n" + V2.encode()
    )
    assert cgroup.mount().path == "/sys/fs/cgroup"


def test_without_proc_the_mount_table_cannot_be_read(files):
    """Without /proc the error says what could not be read."""
    assert files == {}
    with pytest.raises(CgroupError, match="cannot read the mount table"):
        cgroup.mounts()


def test_the_mount_of_a_hybrid_system_is_unified(mounted):
    """Beside version 1 hierarchies, version 2 is where the table says."""
    mounted(HYBRID)
    assert cgroup.mount().path == "/sys/fs/cgroup/unified"
    assert cgroup.root() == Cgroup("/sys/fs/cgroup/unified")


@pytest.mark.parametrize("table", ["", HYBRID.replace("cgroup2", "tmpfs")])
def test_without_version_2_the_remedy_is_told(mounted, table):
    """Where cgroup v2 is not mounted, the error says how to mount it."""
    mounted(table)
    with pytest.raises(CgroupError, match="mount -t cgroup2"):
        cgroup.mount()


def test_what_is_mounted_is_not_mounted_again(mounted, monkeypatch):
    """Where cgroup v2 is mounted, it is returned, and nothing is mounted."""
    monkeypatch.setattr(libc, "mount", lambda *_: pytest.fail("mounted"))
    mounted(V2)
    assert cgroup.mount_if_missing().path == "/sys/fs/cgroup"


def test_it_is_mounted_where_that_is_possible(mounted, monkeypatch, tmp_path):
    """What has contents is left alone; where a directory cannot be made another place is used."""
    full, free = tmp_path / "full", tmp_path / "free"
    (full / "v1").mkdir(parents=True)
    (tmp_path / "file").touch()
    monkeypatch.setattr(cgroup, "_PLACES", (f"{tmp_path}/file/x", str(full), str(free)))
    monkeypatch.setattr(libc, "mount", lambda _, path: mounted(V2.replace("/sys/fs/cgroup", path)))
    mounted("")
    assert cgroup.mount_if_missing().path == str(free)


def test_where_it_cannot_be_mounted_each_reason_is_told(mounted, monkeypatch, tmp_path):
    """Without the right to mount, the error says so for each place."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(cgroup, "_PLACES", (str(tmp_path),))
    monkeypatch.setattr(libc, "mount", refuse)
    mounted("")
    with pytest.raises(CgroupError, match=f"{tmp_path}: not permitted"):
        cgroup.mount_if_missing()


def test_the_mount_that_shows_most_is_used(mounted):
    """Of several mounts the one with the topmost root, then with the shortest path, is used."""
    part = "40 24 0:27 /system.slice /mnt rw - cgroup2 none rw"
    other = "41 24 0:27 / /run/containers/cgroup rw - cgroup2 none rw"
    mounted(part, other, V2)
    assert cgroup.mount().path == "/sys/fs/cgroup"


@pytest.mark.parametrize(
    ("inside", "root", "path"),
    [
        ("/", "/", "/sys/fs/cgroup"),
        ("/a/b.scope", "/", "/sys/fs/cgroup/a/b.scope"),
        ("/outer/a", "/outer", "/sys/fs/cgroup/a"),
        ("/outer", "/outer", "/sys/fs/cgroup"),
        ("/../other", "/..", "/sys/fs/cgroup/other"),
        ("/../../a/b", "/../..", "/sys/fs/cgroup/a/b"),
        ("/..data", "/", "/sys/fs/cgroup/..data"),
    ],
)
def test_the_cgroup_of_a_process_is_below_the_mounts_root(mounted, files, inside, root, path):
    """What /proc says is relative to the mount's root, in a cgroup namespace as well."""
    mounted(V2.replace(" / ", f" {root} ", 1))
    files["/proc/7/cgroup"] = f"0::{inside}\n".encode()
    assert cgroup.from_pid(7).path == path


@pytest.mark.parametrize(
    ("inside", "root"),
    [
        ("/../other", "/"),
        ("/..", "/"),
        ("/../../a", "/.."),
        ("/", "/.."),
        ("/a", "/.."),
        ("/elsewhere/a", "/outer"),
        ("/outerspace", "/outer"),
    ],
)
def test_a_process_outside_of_the_mount_is_refused(mounted, files, inside, root):
    """A process whose cgroup cannot be seen from here is refused, not taken for another's."""
    mounted(V2.replace(" / ", f" {root} ", 1))
    files["/proc/7/cgroup"] = f"0::{inside}\n".encode()
    with pytest.raises(CgroupError, match="another cgroup namespace"):
        cgroup.from_pid(7)


def test_version_1_hierarchies_of_a_process_are_passed_over(mounted, files):
    """On a hybrid system the line of version 2 counts, wherever it is."""
    mounted(HYBRID)
    files["/proc/7/cgroup"] = b"2:memory:/wrong\n1:name=systemd:/wrong\n0::/right\n"
    assert cgroup.from_pid(7).path == "/sys/fs/cgroup/unified/right"


def test_a_path_with_colons_stays_whole(mounted, files):
    """A cgroup's name may contain colons."""
    mounted(V2)
    files["/proc/7/cgroup"] = b"0::/a:b::c\n"
    assert cgroup.from_pid(7).path == "/sys/fs/cgroup/a:b::c"


def test_a_process_without_version_2_is_told_so(files):
    """A process that is in version 1 hierarchies only has no cgroup to limit."""
    files["/proc/7/cgroup"] = b"2:memory:/a\n"
    with pytest.raises(CgroupError, match="not in a cgroup of version 2"):
        cgroup.from_pid(7)


def test_a_removed_cgroup_is_told_so(files):
    """A zombie in a cgroup that was removed has none any more."""
    files["/proc/7/cgroup"] = b"0::/a (deleted)\n"
    with pytest.raises(CgroupError, match="was removed"):
        cgroup.from_pid(7)


def test_a_process_that_is_gone_is_a_process_error(files):
    """Without a process of that number the error says so."""
    assert files == {}
    with pytest.raises(ProcessError, match="no process 7"):
        cgroup.from_pid(7)


def test_a_path_below_the_mount_is_a_cgroup(tree):
    """A directory of the cgroup2 file system is a cgroup, whatever way leads to it."""
    top = tree("a/b")
    (top / "a" / "link").symlink_to(top / "a" / "b")
    for path in ("a/b", "a/b/", "a/../a/b", "a/link"):
        assert cgroup.from_path(str(top / path)).path == os.path.realpath(top / "a" / "b")


def test_a_file_in_a_cgroup_is_refused_with_its_directory(tree):
    """A file such as cgroup.procs is refused, and its directory is named."""
    top = tree("a")
    (top / "a" / "cgroup.procs").touch()
    with pytest.raises(CgroupError, match=r"is a file; give the directory .*/a$"):
        cgroup.from_path(str(top / "a" / "cgroup.procs"))


def test_a_path_that_is_not_there_is_refused(tree):
    """A path that does not exist is refused with the reason."""
    with pytest.raises(CgroupError, match="No such file"):
        cgroup.from_path(str(tree() / "none"))


def test_a_directory_elsewhere_is_no_cgroup(mounted):
    """A directory outside is refused, with where cgroup v2 is."""
    mounted(HYBRID.replace("8:1", "999:1"))
    with pytest.raises(CgroupError, match=r"not a cgroup; .* /sys/fs/cgroup/unified"):
        cgroup.from_path("/")


def test_a_version_1_path_is_told_apart(tree, mounted):
    """A path in a version 1 hierarchy is refused as such, with where version 2 is."""
    top = tree("a")
    device = cgroup.mounts()[0].device
    mounted(HYBRID, Mount(device, "/", str(top), "cgroup"))
    with pytest.raises(CgroupError, match=r"cgroup v1 hierarchy; .* /sys/fs/cgroup/unified"):
        cgroup.from_path(str(top / "a"))


@pytest.mark.parametrize("name", ["ssh", "ssh.service"])
def test_a_unit_is_found_by_its_directory(tree, name):
    """A service is found with and without its suffix."""
    top = tree("system.slice/ssh.service/inner", "user.slice")
    assert cgroup.from_unit(name).path == str(top / "system.slice" / "ssh.service")


@pytest.mark.parametrize("name", ["user.slice", "session-2.scope", "docker.socket"])
def test_units_of_other_kinds_have_their_suffix(tree, name):
    """A slice, a scope or a socket is found by its whole name."""
    top = tree("user.slice/user-0.slice/session-2.scope", "system.slice/docker.socket")
    found = cgroup.from_unit(name).path
    assert os.path.basename(found) == name
    assert found.startswith(str(top))


def test_a_unit_that_does_not_run_is_told_so(tree):
    """A unit without a cgroup is refused by its whole name."""
    tree("system.slice")
    with pytest.raises(CgroupError, match=r"'ssh\.service' has no cgroup; is it running"):
        cgroup.from_unit("ssh")


def test_a_unit_of_several_users_is_ambiguous(tree):
    """A unit that is there twice is refused with both paths."""
    top = tree("user-1.slice/app.service", "user-2.slice/app.service")
    with pytest.raises(CgroupError, match="ambiguous") as caught:
        cgroup.from_unit("app")
    for user in ("user-1.slice", "user-2.slice"):
        assert str(top / user / "app.service") in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", "/sys/fs/cgroup/a", "../a.slice"])
def test_a_path_is_no_unit(tree, name):
    """A name with a slash is refused, and --cgroup is named."""
    tree("a")
    with pytest.raises(CgroupError, match="--cgroup"):
        cgroup.from_unit(name)


@pytest.mark.parametrize(
    ("outer", "inner", "within"),
    [
        ("/a", "/a", True),
        ("/a", "/a/b", True),
        ("/a", "/ab", False),
        ("/a/b", "/a", False),
        ("/", "/a", True),
    ],
)
def test_a_cgroup_contains_what_is_below_it(outer, inner, within):
    """A cgroup contains itself and what is below, but not what only begins like it."""
    assert (Cgroup(inner) in Cgroup(outer)) is within


def test_the_mount_is_looked_up_once_under_the_lock(monkeypatch):
    """Many ask for it to put one limit in force; afterwards it may have changed."""
    looked = []
    table = cgroup.mounts()
    monkeypatch.setattr(cgroup, "mounts", lambda: (looked.append(1), table)[1])
    with cgroup.locked():
        found = cgroup.mount()
        looked.clear()
        assert cgroup.root().path == found.path
        assert looked == []
    cgroup.mount()
    assert looked == [1]


def test_the_mount_is_looked_up_once_without_the_lock_too(monkeypatch):
    """For a limit that is to be just what is said; the lock may be taken or left meanwhile."""
    looked = []
    table = cgroup.mounts()
    monkeypatch.setattr(cgroup, "mounts", lambda: (looked.append(1), table)[1])
    with cgroup.mounted_once():
        with cgroup.mounted_once():
            cgroup.mount()
        cgroup.mount()
        assert looked == [1]
    cgroup.mount()
    cgroup.mount()
    assert looked == [1, 1, 1]
    with cgroup.locked():
        cgroup.mount()
        looked.clear()
        with cgroup.mounted_once():
            cgroup.mount()
        cgroup.mount()
    assert looked == []
    cgroup.mount()
    assert looked == [1]
