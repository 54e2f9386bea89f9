"use strict";

// The views of the report. What is shown follows from the address, the part behind "#", alone:
// links, the browser's history and bookmarks work, and each image has an address of its own.
// All text from the data reaches the page as text, through textContent and attributes.
const gradcampp = (() => {
  const CARDS = 60;
  const at = (id) => document.getElementById(id);
  const root = document.documentElement;

  let rows = []; // of the index: path, predicted, confidence, label, right, figures
  let meta = {};
  const pages = new Map(); // number -> promise of details
  const arrived = new Map(); // number -> what receives them
  let state = {};
  let matching = [];
  let focused = 0; // position of the card that the tabulator reaches

  const PATH = 0, PREDICTED = 1, CONFIDENCE = 2, LABEL = 3, RIGHT = 4, FIGURES = 5;
  const COLUMNS = new Map([ // to sort by
    ["path", (row) => row[PATH]],
    ["confidence", (row) => row[CONFIDENCE]],
  ]);

  // Data

  function index(given) {
    rows = given;
  }

  function page(number, details) {
    arrived.get(number)(details);
  }

  function load(number) {
    if (!pages.has(number)) {
      pages.set(number, new Promise((resolve, reject) => {
        arrived.set(number, resolve);
        const script = document.createElement("script");
        script.src = `data/${number}.js`;
        script.onload = () => script.remove();
        script.onerror = () => {
          pages.delete(number);
          script.remove();
          reject(new Error(`data/${number}.js cannot be read; was the report moved without it?`));
        };
        document.head.append(script);
      }));
    }
    return pages.get(number);
  }

  async function details(id) {
    return (await load(Math.floor(id / meta.perPage)))[id % meta.perPage];
  }

  // The address

  const DEFAULTS = {
    view: "gallery", id: 0, q: "", right: "", predicted: "", label: "", low: 0, high: 100,
    sort: "", page: 1, rank: 1, layer: 0, method: 0,
  };

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    const found = { ...DEFAULTS };
    for (const [name, standard] of Object.entries(DEFAULTS)) {
      const value = given.get(name);
      if (value === null) continue;
      if (typeof standard === "string") found[name] = value;
      else if (Number.isInteger(Number(value))) found[name] = Number(value);
    }
    found.rank = clamp(found.rank, 1, Math.max(1, meta.ranks));
    found.layer = clamp(found.layer, 0, meta.layers.length - 1);
    found.method = clamp(found.method, 0, meta.methods.length - 1);
    return found;
  }

  function address(changes) {
    const target = { ...state, ...changes };
    const given = new URLSearchParams();
    for (const [name, standard] of Object.entries(DEFAULTS)) {
      if (String(target[name]) !== String(standard)) given.set(name, target[name]);
    }
    return `#${given}`;
  }

  const go = (changes) => { location.hash = address(changes); };

  // Without a new entry in the history: each step of a slider would be one.
  const change = (changes) => { location.replace(address(changes)); };
  const filter = (changes) => { focused = 0; change({ ...changes, page: 1 }); };
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // Filters and order

  function select() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (let id = 0; id < rows.length; id++) {
      const row = rows[id];
      if (state.right !== "" && row[RIGHT] !== (state.right === "right")) continue;
      if (state.predicted !== "" && String(row[PREDICTED]) !== state.predicted) continue;
      if (state.label !== "" && String(row[LABEL]) !== state.label) continue;
      const percent = 100 * row[CONFIDENCE];
      if (percent < state.low || percent > state.high) continue;
      if (words.length) {
        const text = `${row[PATH]} ${name(row[PREDICTED])} ${name(row[LABEL])}`.toLowerCase();
        if (!words.every((word) => text.includes(word))) continue;
      }
      found.push(id);
    }
    return sorted(found);
  }

  const column = () => state.sort.replace(/^-/, "");

  // Figures are those of the maps that are shown. Ties, and what has no figure, stay in the order of the run.
  function sorted(ids) {
    const descending = state.sort.startsWith("-");
    const value = COLUMNS.get(column());
    if (value === undefined) return ids;
    const which = kind(state.rank);
    const collator = new Intl.Collator(undefined, { numeric: true });
    const order = state.sort === "path" ? collator.compare : (a, b) => a - b;
    return ids.sort((a, b) => {
      const one = value(rows[a], which), other = value(rows[b], which);
      if (one === null || other === null) return (one === null) - (other === null);
      return descending ? order(other, one) : order(one, other);
    });
  }

  // Pieces of a page

  function element(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key in made) made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const name = (number) => (number === null ? "" : meta.classes[number] ?? String(number));
  const url = (path) => path.split("/").map(encodeURIComponent).join("/");
  const share = (value) => `${(100 * value).toFixed(value < 0.1 || value > 0.99 ? 1 : 0)} %`;
  const count = (number) => number.toLocaleString("en");
  const digits = (figure) => figure?.toPrecision(4) ?? "none";
  const words = (figure) => figure.replaceAll("_", " ");
  const file = (path) => path.split(/[/\\]/).pop();

  // Which maps of the pictures are meant: a number, see meta.kinds.
  function kind(rank) {
    return meta.kinds.findIndex((one) => one[0] === rank && one[1] === state.layer && one[2] === state.method);
  }

  function chosen(picture) {
    const of = (which) => picture.maps.find((map) => map.kind === which);
    return of(kind(state.rank)) ?? of(kind(1)) ?? picture.maps[0];
  }

  // What tells a map from the others of its picture.
  const title = (map) => [...(meta.ranks > 1 ? [name(map.target)] : []), ...variant(map)].join(" · ");

  function variant(map) {
    const [, layer, method] = meta.kinds[map.kind];
    return [
      ...(meta.layers.length > 1 ? [meta.layers[layer]] : []),
      ...(meta.methods.length > 1 ? [meta.methods[method]] : []),
    ];
  }

  // What the images are sorted by, of one map.
  function sortedBy(map) {
    const number = meta.figures.indexOf(column());
    return number < 0 ? [] : [element("small", {}, `${words(column())} ${digits(map.figures[number])}`)];
  }

  function layers(picture, map, alt) {
    return [
      element("img", { src: url(picture.image), alt, loading: "lazy", decoding: "async", className: "photo" }),
      element("img", { src: url(map.grey), alt: "", loading: "lazy", decoding: "async", className: "heat" }),
    ];
  }

  function verdict(right, label) {
    if (right === null) return null;
    return right
      ? element("small", { className: "is-right" }, "✓ right")
      : element("small", { className: "is-wrong", title: name(label) }, `✗ is ${name(label)}`);
  }

  // Gallery

  const last = () => Math.max(1, Math.ceil(matching.length / CARDS));

  let drawn = 0; // only the last of drawings that overlap may reach the page

  async function gallery() {
    const start = (state.page - 1) * CARDS;
    const ids = matching.slice(start, start + CARDS);
    focused = clamp(focused, 0, Math.max(0, ids.length - 1));

    const drawing = ++drawn;
    const pictures = await Promise.all(ids.map(details));
    if (drawing !== drawn) return;
    at("cards").replaceChildren(...ids.map((id, position) => card(id, pictures[position], position)));
    at("status").textContent = matching.length
      ? `${count(start + 1)} to ${count(start + ids.length)} of ${count(matching.length)} images` +
        (matching.length < rows.length ? `, ${count(rows.length)} in all` : "")
      : rows.length ? "No image matches these filters." : "No images.";
    at("pager").hidden = last() === 1;
    at("page").value = state.page;
    at("page").max = last();
    at("pages").textContent = count(last());
    at("previous-page").disabled = state.page === 1;
    at("next-page").disabled = state.page === last();
    filters();
  }

  function card(id, picture, position) {
    const map = chosen(picture);
    const caption = element("span", { className: "caption" },
      element("span", { className: "first" },
        element("b", { title: name(picture.predicted) }, name(picture.predicted)),
        element("span", { className: "share" }, share(picture.confidence))));
    const right = verdict(picture.right, picture.label);
    if (right) caption.append(right);
    caption.append(map.target === picture.predicted
      ? element("small", { title: picture.path }, file(picture.path))
      : element("small", { title: name(map.target) }, `map: ${name(map.target)}, ${share(map.probability)}`));
    caption.append(...sortedBy(map));
    return element("li", {}, element("a", {
      className: "card", href: address({ view: "image", id }), tabIndex: position === focused ? 0 : -1,
    }, element("span", { className: "layers" }, ...layers(picture, map, picture.path)), caption));
  }

  function filters() {
    const set = (id, value) => { if (at(id) && at(id) !== document.activeElement) at(id).value = value; };
    set("search", state.q);
    set("predicted", state.predicted);
    set("label", state.label);
    set("low", state.low);
    set("high", state.high);
    at("sort").value = state.sort;
    for (const input of document.querySelectorAll("input[name=right]")) input.checked = input.value === state.right;
    at("between").textContent = `${state.low} to ${state.high} %`;
    for (const [bin, rect] of [...at("spark").children].entries()) {
      const bins = at("spark").children.length;
      rect.classList.toggle("inside", (100 * (bin + 1)) / bins > state.low && (100 * bin) / bins < state.high);
    }
    const active = ["q", "right", "predicted", "label"].filter((key) => state[key] !== "").length +
      (state.low > 0 || state.high < 100);
    at("active").textContent = `(${active})`;
    at("active").hidden = !active;
    at("clear").disabled = !active && !state.sort;
  }

  function options(select, column) {
    if (!select) return;
    const counts = new Map();
    for (const row of rows) {
      if (row[column] !== null) counts.set(row[column], (counts.get(row[column]) ?? 0) + 1);
    }
    const sorted = [...counts].sort((a, b) => name(a[0]).localeCompare(name(b[0])));
    select.append(...sorted.map(([number, many]) =>
      element("option", { value: String(number) }, `${name(number)} (${count(many)})`)));
  }

  function spark() {
    const bins = at("spark").viewBox.baseVal.width;
    const counts = new Array(bins).fill(0);
    for (const row of rows) counts[Math.min(bins - 1, Math.floor(row[CONFIDENCE] * bins))]++;
    const most = Math.max(1, ...counts);
    at("spark").replaceChildren(...counts.map((many, bin) => {
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      const height = many ? Math.max(0.4, (10 * many) / most) : 0;
      for (const [key, value] of Object.entries({ x: bin + 0.08, y: 10 - height, width: 0.84, height })) {
        rect.setAttribute(key, value);
      }
      return rect;
    }));
  }

  // An image

  async function image() {
    const id = clamp(state.id, 0, rows.length - 1);
    const drawing = ++drawn;
    const picture = await details(id);
    if (drawing !== drawn) return;
    const map = chosen(picture);
    const position = matching.indexOf(id);
    const link = (anchor, other) => {
      if (other === undefined) anchor.removeAttribute("href");
      else anchor.href = address({ id: other });
    };
    link(at("previous"), position < 0 ? undefined : matching[position - 1]);
    link(at("next"), position < 0 ? undefined : matching[position + 1]);
    at("back").href = address({ view: "gallery", id: 0, page: position < 0 ? 1 : 1 + Math.floor(position / CARDS) });
    at("position").textContent = position < 0
      ? "not among the images of these filters"
      : `${count(position + 1)} of ${count(matching.length)}`;
    at("image-title").textContent = name(picture.predicted);
    const right = picture.right === null ? "" : picture.right ? ", right" : `, wrong: it is ${name(picture.label)}`;
    at("verdict").textContent = `predicted with ${share(picture.confidence)}${right}`;
    at("verdict").className = picture.right === null ? "" : picture.right ? "is-right" : "is-wrong";
    document.title = `${name(picture.predicted)} · ${file(picture.path)}`;

    at("stage").replaceChildren(...layers(picture, map, picture.path));
    if (map.peak && at("mark").checked) {
      const peak = element("span", { className: "peak" });
      peak.style.left = `${100 * map.peak[0]}%`;
      peak.style.top = `${100 * map.peak[1]}%`;
      at("stage").append(peak);
    }
    at("maps").replaceChildren(...picture.maps.map((one) => choice(picture, one, one === map)));
    const several = picture.maps.length > 1;
    at("maps").hidden = !several;
    at("maps").classList.toggle("dense", meta.ranks === 1);
    at("figures").hidden = !several || !meta.figures.length;
    at("figures").replaceChildren(table(picture, map));
    const facts = [
      ["file", picture.path],
      ["size", `${picture.width} × ${picture.height} pixels`],
      ["explained", `${name(map.target)} (class ${map.target})`],
      ["layer", meta.layers[meta.kinds[map.kind][1]]],
      ["method", meta.methods[meta.kinds[map.kind][2]]],
      ["probability", share(map.probability)],
      ["score", map.score.toFixed(3)],
      ...(several ? [] : meta.figures.map((figure, number) => [words(figure), digits(map.figures[number])])),
    ].filter(([, value]) => value !== "");
    at("facts").replaceChildren(...facts.flatMap(([key, value]) =>
      [element("dt", {}, key), element("dd", {}, value)]));
    for (const other of [matching[position + 1], matching[position - 1]]) {
      if (other !== undefined && position >= 0) details(other).then((next) => { new Image().src = url(next.image); });
    }
  }

  function table(picture, shown) {
    return element("table", {},
      element("thead", {}, element("tr", {}, element("td"),
        ...meta.figures.map((figure) => element("th", { scope: "col", className: "count" }, words(figure))))),
      element("tbody", {}, ...picture.maps.map((map) =>
        element("tr", { className: map === shown ? "shown" : "" },
          element("th", { scope: "row" }, title(map)),
          ...meta.figures.map((_, number) => element("td", { className: "count" }, digits(map.figures[number])))))));
  }

  function choice(picture, map, pressed) {
    const about = element("span", { className: "about" });
    if (meta.ranks > 1) {
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      bar.setAttribute("class", "bar");
      bar.setAttribute("aria-hidden", "true");
      rect.setAttribute("width", `${100 * map.probability}%`);
      rect.setAttribute("height", "100%");
      bar.append(rect);
      about.append(element("span", { className: "line" },
        element("span", { className: "name" }, name(map.target)),
        element("span", { className: "share" }, share(map.probability))), bar);
    }
    about.append(...variant(map).map((one) => element("small", { title: one }, one)), ...sortedBy(map));
    const button = element("button", {
      type: "button", className: "map", "aria-pressed": String(pressed),
    }, element("span", { className: "layers" }, ...layers(picture, map, "")), about);
    button.addEventListener("click", () => {
      const [rank, layer, method] = meta.kinds[map.kind];
      change({ rank, layer, method });
    });
    return button;
  }

  // Views

  async function show() {
    const before = state;
    state = read();
    const filtered = ["q", "right", "predicted", "label", "low", "high", "sort", "rank", "layer", "method"];
    if (before.view === undefined || filtered.some((key) => before[key] !== state[key])) matching = select();
    if (!["gallery", "image", "summary"].includes(state.view)) state.view = "gallery";
    if (state.view === "image" && !rows.length) state.view = "gallery";
    state.page = clamp(state.page, 1, last());
    for (const view of ["gallery", "image", "summary"]) at(view).hidden = state.view !== view;
    at("lens").hidden = false;
    at("lens").dataset.view = state.view;
    for (const link of document.querySelectorAll("header nav a")) {
      link.href = address({ view: link.dataset.view, id: 0 });
      if (link.dataset.view === state.view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    for (const id of ["rank", "layer", "method"]) if (at(id)) at(id).value = state[id];
    document.title = document.body.dataset.title;
    try {
      if (state.view === "gallery") {
        if (before.view === "image") focused = Math.max(0, matching.indexOf(before.id)) % CARDS;
        await gallery();
        if (before.view === "image") cards()[focused]?.focus();
      } else if (state.view === "image") {
        await image();
        if (before.view !== "image") {
          window.scrollTo(0, 0);
          at("image-title").focus({ preventScroll: true });
        }
      } else if (before.view !== "summary") {
        window.scrollTo(0, 0);
      }
      at("failure").hidden = true;
    } catch (error) {
      at("failure").textContent = error.message;
      at("failure").hidden = false;
    }
  }

  // What the reader likes, kept for the next report where the browser allows it

  const liked = {
    get(key) { try { return localStorage.getItem(`gradcampp.${key}`); } catch { return null; } },
    set(key, value) { try { localStorage.setItem(`gradcampp.${key}`, value); } catch { /* not kept */ } },
  };

  function setOpacity(percent) {
    at("opacity").value = percent;
    at("opacity-value").textContent = `${at("opacity").value} %`;
    root.style.setProperty("--opacity", at("opacity").value / 100);
    liked.set("opacity", at("opacity").value);
  }

  function setColours(value) {
    at("colours").value = value;
    if (at("colours").selectedIndex < 0) at("colours").selectedIndex = 0;
    root.style.setProperty("--colours", `url("#colours-${at("colours").value}")`);
  }

  function setTheme(theme) {
    root.dataset.theme = theme;
    liked.set("theme", theme);
  }

  function otherTheme() {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    setTheme(dark ? "light" : "dark");
  }

  // Keys

  const cards = () => [...at("cards").querySelectorAll(".card")];

  function reach(position) {
    const all = cards();
    if (!all.length) return;
    all[focused]?.setAttribute("tabindex", "-1");
    focused = clamp(position, 0, all.length - 1);
    all[focused].setAttribute("tabindex", "0");
    all[focused].focus();
  }

  function columns() {
    const all = cards();
    const top = all[0]?.offsetTop;
    const next = all.findIndex((one) => one.offsetTop !== top);
    return next < 0 ? Math.max(1, all.length) : next;
  }

  async function turn(step, position) {
    const wanted = state.page + step;
    if (wanted < 1 || wanted > last()) return;
    const inside = at("cards").contains(document.activeElement);
    focused = position;
    change({ page: wanted });
    await moved();
    at("cards").scrollIntoView({ block: "nearest" });
    if (inside) reach(position);
    else window.scrollTo(0, 0);
  }

  let settle = () => {};
  const moved = () => new Promise((resolve) => { settle = resolve; });

  function arrows(key) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() }[key];
    if (!at("cards").contains(document.activeElement)) return reach(focused);
    const wanted = focused + step;
    if (wanted < 0) return turn(-1, CARDS - 1);
    if (wanted >= cards().length) {
      // below an incomplete last line lies its last card
      if (key === "ArrowDown" && Math.floor(focused / step) < Math.floor((cards().length - 1) / step)) return reach(cards().length - 1);
      return turn(1, 0);
    }
    return reach(wanted);
  }

  let hidden = null; // the opacity to come back to

  const KEYS = {
    "[": () => setOpacity(Number(at("opacity").value) - 10),
    "]": () => setOpacity(Number(at("opacity").value) + 10),
    "h": () => {
      if (at("opacity").value > 0) { hidden = at("opacity").value; setOpacity(0); }
      else setOpacity(hidden ?? 50);
    },
    "c": () => change({ rank: 1 + (state.rank % Math.max(1, meta.ranks)) }),
    "l": () => change({ layer: (state.layer + 1) % meta.layers.length }),
    "m": () => change({ method: (state.method + 1) % meta.methods.length }),
    "s": () => go({ view: "summary" }),
    "g": () => go({ view: "gallery" }),
    "t": otherTheme,
    "?": () => at("keys").showModal(),
    "/": async () => {
      if (state.view !== "gallery") {
        go({ view: "gallery" });
        await moved();
      }
      at("filters").open = true;
      at("search").focus();
    },
  };

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || at("keys").open) return;
    const target = event.target;
    if (event.key === "Escape" && state.view === "image") return void (location.hash = at("back").hash);
    if (target.matches("select, textarea, input:not([type=checkbox], [type=radio], [type=range])")) return;
    const arrow = event.key.startsWith("Arrow");
    if (target.matches("input[type=range], input[type=radio]") && (arrow || event.key.startsWith("Page"))) return;
    let act = KEYS[event.key];
    if (state.view === "gallery") {
      if (arrow && (target === document.body || target === at("content") || at("cards").contains(target))) act = () => arrows(event.key);
      if (event.key === "PageDown") act = () => turn(1, 0);
      if (event.key === "PageUp") act = () => turn(-1, 0);
      if (at("cards").contains(target)) {
        if (event.key === "Home") act = () => reach(0);
        if (event.key === "End") act = () => reach(CARDS);
      }
    } else if (state.view === "image" && arrow) {
      const step = event.key === "ArrowRight" || event.key === "ArrowDown" ? 1 : -1;
      act = () => {
        // from the address: a key may come before the last one's image is shown
        const position = matching.indexOf(read().id);
        const other = position < 0 ? undefined : matching[position + step];
        if (other !== undefined) change({ id: other });
      };
    }
    if (!act) return;
    event.preventDefault();
    act();
  }

  function start(given) {
    meta = given;
    if (!meta.kinds.length) meta.layers = meta.methods = [""];
    for (const [number, figure] of meta.figures.entries()) {
      COLUMNS.set(figure, (row, which) => row[FIGURES][which]?.[number] ?? null);
      at("sort").append(
        element("option", { value: figure }, `${words(figure)}, smallest first`),
        element("option", { value: `-${figure}` }, `${words(figure)}, largest first`));
    }
    root.style.setProperty("--ratio", meta.ratio);
    options(at("predicted"), PREDICTED);
    options(at("label"), LABEL);
    spark();
    const on = (id, event, act) => at(id)?.addEventListener(event, act);
    on("opacity", "input", () => setOpacity(at("opacity").value));
    on("colours", "change", () => setColours(at("colours").value));
    on("rank", "change", () => change({ rank: at("rank").value }));
    on("layer", "change", () => change({ layer: at("layer").value }));
    on("method", "change", () => change({ method: at("method").value }));
    let waiting;
    on("search", "input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => filter({ q: at("search").value }), 150);
    });
    on("predicted", "change", () => filter({ predicted: at("predicted").value }));
    on("label", "change", () => filter({ label: at("label").value }));
    on("sort", "change", () => filter({ sort: at("sort").value }));
    on("low", "input", () => {
      at("low").value = Math.min(at("low").value, state.high);
      filter({ low: Number(at("low").value) });
    });
    on("high", "input", () => {
      at("high").value = Math.max(at("high").value, state.low);
      filter({ high: Number(at("high").value) });
    });
    for (const input of document.querySelectorAll("input[name=right]")) {
      input.addEventListener("change", () => filter({ right: input.value }));
    }
    on("clear", "click", () => filter({ q: "", right: "", predicted: "", label: "", low: 0, high: 100, sort: "" }));
    on("previous-page", "click", () => turn(-1, 0));
    on("next-page", "click", () => turn(1, 0));
    on("page", "change", () => { focused = 0; change({ page: Number(at("page").value) }); });
    on("mark", "change", show);
    on("theme", "click", otherTheme);
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault();
      at("content").focus();
    });
    on("help", "click", () => at("keys").showModal());
    for (const form of document.querySelectorAll("main form, #lens")) {
      form.addEventListener("submit", (event) => event.preventDefault());
    }
    at("cards").addEventListener("focusin", (event) => {
      const position = cards().indexOf(event.target);
      if (position >= 0) focused = position;
    });
    addEventListener("keydown", key);
    addEventListener("hashchange", () => show().then(() => settle()));
    if (matchMedia("(max-width: 860px)").matches) at("filters").open = false;
    setTheme(liked.get("theme") ?? "");
    setOpacity(liked.get("opacity") ?? 50);
    setColours(at("colours").value);
    show();
  }

  return { index, page, start };
})();
