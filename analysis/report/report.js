"use strict";
// A number is read from a cell's text: "81.2 [70.1, 90.2]", "−3.0 ‡", "1.2e+03"; words sort as words.
function valueOf(text) {
  const found = text.replaceAll("−", "-").match(/^[+-]?\d[\d,]*\.?\d*(e[+-]?\d+)?/);
  return found ? Number(found[0].replaceAll(",", "")) : null;
}

function compareTexts(first, second) {
  const [one, two] = [valueOf(first), valueOf(second)];
  if (one !== null && two !== null) return one - two;
  if (one !== null || two !== null) return one !== null ? -1 : 1;
  return first.localeCompare(second, "en", { numeric: true });
}

const isMissing = (text) => text === "–" || text === "";

function makeSortable(table) {
  const body = table.tBodies[0];
  const asWritten = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    // Not a button inside the head: a head with one is printed empty on all pages but the first.
    head.tabIndex = 0;
    head.title = "Sort up, down, or as it was";
    head.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      head.click();
    });
    head.addEventListener("click", () => {
      const order = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (order === null) return body.append(...asWritten);
      head.setAttribute("aria-sort", order ?? "ascending");
      const rows = asWritten.map((row) => [row.cells[place].textContent.trim(), row]);
      // What is missing comes last either way.
      rows.sort(([one], [two]) =>
        isMissing(one) || isMissing(two)
          ? Number(isMissing(one)) - Number(isMissing(two))
          : compareTexts(one, two) * (order ? -1 : 1));
      body.append(...rows.map(([, row]) => row));
    });
  });
}

function labelled(kind, words) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  input.type = kind;
  label.append(input, ` ${words}`);
  return [label, input];
}

function addTools(table) {
  const tools = document.createElement("div");
  tools.className = "tools";
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "Filter rows";
  search.setAttribute("aria-label", "Show only the rows with all of these words");
  const count = document.createElement("span");
  count.className = "soft";
  count.setAttribute("role", "status");
  const rows = [...table.tBodies[0].rows];
  // What is not seen is not found: a hidden column, or words across two cells.
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const seen = [...row.cells].filter((cell) => !cell.hidden).map((cell) => cell.textContent);
      const text = seen.join("\n").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  };
  search.addEventListener("input", filter);
  const columns = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "Columns";
  columns.append(summary);
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const [label, box] = labelled("checkbox", head.textContent);
    const show = () => {
      for (const row of table.rows) row.cells[place].hidden = !box.checked;
      const hidden = [...table.tHead.rows[0].cells].filter((one) => one.hidden).length;
      summary.textContent = hidden ? `Columns (${hidden} hidden)` : "Columns";
      filter();
    };
    box.checked = !head.classList.contains("minor");
    box.addEventListener("change", show);
    show();
    columns.append(label);
  });
  tools.append(search, count, columns);
  table.closest(".wide").before(tools);
}

// Of the columns of words the first names the row: it stays in sight.
function keepFirst(table) {
  const place = [...table.tHead.rows[0].cells].findIndex((head) => head.classList.contains("word"));
  if (place >= 0) for (const row of table.rows) row.cells[place].classList.add("first");
}

for (const table of document.querySelectorAll("main table")) {
  keepFirst(table);
  const number = table.tBodies[0].rows.length;
  if (number > 1) makeSortable(table);
  if (number > 5 || table.querySelector("th.minor")) addTools(table);
}

// A point says what is behind it when it is pointed at, touched, or reached by the arrow keys.
const tip = document.getElementById("tip");
let lit = null;
function show(point) {
  hide();
  lit = point;
  point.classList.add("on");
  tip.textContent = point.dataset.text;
  tip.hidden = false;
  const box = point.getBoundingClientRect();
  const width = Math.min(tip.offsetWidth, window.innerWidth - 16);
  tip.style.left = `${Math.max(8, Math.min(box.right + 6, window.innerWidth - width - 8))}px`;
  const above = box.top - tip.offsetHeight - 6;
  tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
}
function hide() {
  if (lit) lit.classList.remove("on");
  lit = null;
  tip.hidden = true;
}
for (const picture of document.querySelectorAll("svg.picture")) {
  const points = [...picture.querySelectorAll(".points circle")];
  for (const point of points) point.addEventListener("pointerenter", () => show(point));
  // A finger that is lifted leaves, too: what it touched stays until something else is touched.
  picture.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  picture.addEventListener("blur", hide);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!step || !points.length) return;
    event.preventDefault();
    const place = points.indexOf(lit);
    const next = points[(place < 0 && step < 0 ? points.length - 1 : place + step + points.length) % points.length];
    const wide = picture.closest(".wide"); // what does not fit a narrow screen is scrolled to
    const across = next.getBoundingClientRect().left - wide.getBoundingClientRect().left;
    if (across < 0 || across > wide.clientWidth) wide.scrollLeft += across - wide.clientWidth / 2;
    show(next);
  });
}
// A narrow screen has the legend below a figure, and the figure without the place for it.
const isNarrow = matchMedia("(max-width: 620px)");
function fitPictures() {
  for (const picture of document.querySelectorAll("svg.picture[data-plot]")) {
    picture.classList.add("fitted"); // without this script the legend stays in the figure
    picture.dataset.whole ??= picture.viewBox.baseVal.width;
    const width = Number(isNarrow.matches ? picture.dataset.plot : picture.dataset.whole);
    picture.setAttribute("viewBox", `0 0 ${width} ${picture.viewBox.baseVal.height}`);
    picture.style.setProperty("--units", width);
  }
}
isNarrow.addEventListener("change", fitPictures);
fitPictures();
// What does not fit fades out on the right until it is scrolled to.
function fade(wide) {
  wide.classList.toggle("goes-on", wide.scrollLeft + wide.clientWidth < wide.scrollWidth - 1);
}
const resized = new ResizeObserver((entries) => entries.forEach((one) => fade(one.target.closest(".wide"))));
for (const wide of document.querySelectorAll(".wide")) {
  wide.addEventListener("scroll", () => fade(wide), { passive: true });
  resized.observe(wide);
  for (const one of wide.children) resized.observe(one);
}
addEventListener("scroll", hide, { passive: true });
addEventListener("pointerdown", (event) => event.target.closest(".points") || hide());

// A link into a folded section opens it, and so does printing; samples are printed as they are.
function open(element) {
  for (let one = element; one; one = one.parentElement) if (one.tagName === "DETAILS") one.open = true;
}
function openTarget() {
  const target = document.getElementById(location.hash.slice(1)); // names here need no escapes
  if (target) {
    open(target);
    target.scrollIntoView();
  }
}
addEventListener("hashchange", openTarget);
openTarget();
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("main details:not(.tools details, .samples details, [open])")];
  for (const one of opened) one.open = true;
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
});

// The contents say where the reader is.
const links = new Map([...document.querySelectorAll("nav a")].map((one) => [one.hash.slice(1), one]));
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    const link = links.get(entry.target.id);
    link.setAttribute("aria-current", "true");
    const bar = link.closest("nav"); // not scrollIntoView, which moves the page too
    bar.scrollLeft = link.offsetLeft - Math.max(14, (bar.clientWidth - link.offsetWidth) / 2);
    bar.scrollTop = link.offsetTop - bar.clientHeight / 2;
  }
}, { rootMargin: "-10% 0px -80% 0px" });
for (const id of links.keys()) watcher.observe(document.getElementById(id));
