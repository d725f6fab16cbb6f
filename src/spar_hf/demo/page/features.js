// Features as pictures: a click, or an arrow key, asks for the similarity of another place.
const find = (name) => element.querySelector(name);
const node = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};
let timer = null;
let place = [0.5, 0.5];   // the chosen place, from left and from top

function ask(x, y) {
  const inside = (share) => Math.min(1, Math.max(0, share));
  for (const mark of element.querySelectorAll('.mark')) {
    mark.style.left = `${100 * inside(x)}%`;
    mark.style.top = `${100 * inside(y)}%`;
  }
  place = [inside(x), inside(y)];
  clearTimeout(timer);
  timer = setTimeout(() => trigger('select', { x: inside(x), y: inside(y) }), 120);
}

function render() {
  const value = props.value || {}, box = find('.features');
  find('.hint').innerHTML = props.hint;                     // fixed text of the app
  find('.message').hidden = !value.message;
  find('.message').textContent = value.message || '';
  box.dataset.state = value.pictures ? 'shown' : value.message ? 'message' : 'empty';
  find('.note').textContent = value.note || '';
  const focused = [...element.querySelectorAll('.frame')].indexOf(document.activeElement);
  place = value.place || place;
  const panels = find('.panels');
  panels.replaceChildren();
  for (const picture of value.pictures || []) {
    const figure = node('figure'), frame = node('div', 'frame'), image = node('img'), mark = node('span', 'mark');
    image.src = picture.source;
    image.alt = picture.title;
    image.width = picture.width; image.height = picture.height;
    mark.style.left = `${100 * place[0]}%`;
    mark.style.top = `${100 * place[1]}%`;
    frame.tabIndex = 0;
    frame.setAttribute('role', 'group');
    frame.setAttribute('aria-label', `${picture.title}. Click a place, or move with the arrow keys.`);
    frame.onclick = (event) => {
      const area = frame.getBoundingClientRect();
      ask((event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height);
    };
    frame.onkeydown = (event) => {
      const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!steps) return;
      event.preventDefault();
      ask(place[0] + steps[0] / value.grid[1], place[1] + steps[1] / value.grid[0]);
    };
    frame.append(image, mark);
    figure.append(node('figcaption', '', picture.title), frame);
    panels.append(figure);
  }
  const frames = element.querySelectorAll('.frame');
  if (focused >= 0 && frames[focused]) frames[focused].focus({ preventScroll: true });
}

watch('value', render);
render();
